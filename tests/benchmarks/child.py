"""One piece of the bench in a process of its own: `python -m tests.benchmarks.child TASK.json`.

Standard output carries JSON lines alone; whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from stages.models.memory.lean_import import import_transformers
from stages.runtime.contract import StageError
from stages.runtime.peak_memory import peak_rss_bytes
from stages.runtime.progress import JsonLines
from tests.benchmarks.techniques import CONTROLS

Task = Mapping[str, Any]
TEXTS = ("text", "other")


def windows(task: Task, tell: JsonLines) -> dict[str, float]:
    """Cut the corpora into windows and keep them in one file, so that every tool reads the same ones."""
    from safetensors.torch import save_file

    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.text.windows import windows as cut

    folders, tokens = {name: Path(task[name]) for name in TEXTS}, int(task["tokens"])
    tokenizer = load_tokenizer(Path(task["dense"]))
    found = {name: cut(folder, "test", tokenizer, tokens, most=task["windows"]) for name, folder in folders.items()}
    found["calibrate"] = cut(folders["text"], "calibrate", tokenizer, tokens, most=task["calibration"])
    found["train"] = cut(folders["text"], "train", tokenizer, min(256, tokens))
    save_file(found, task["path"])
    return {name: float(len(ids_NT)) for name, ids_NT in found.items()}


def run(task: Task, tell: JsonLines) -> dict[str, Any]:
    """A stage's own `run` on folders, timed without what imports take."""
    began = time.monotonic()
    import_transformers()
    operation, params = _operation(task)
    imported = time.monotonic()
    output = Path(task["output"])
    output.mkdir(parents=True)
    metrics = operation(params, {role: Path(folder) for role, folder in task["inputs"].items()}, output, tell)
    return {
        "seconds": time.monotonic() - imported,
        "import_seconds": imported - began,
        "peak_rss_bytes": peak_rss_bytes(),
        "metrics": dict(metrics),
        "size_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
    }


def _operation(task: Task) -> tuple[Callable[..., Any], Any]:
    from stages import stage

    if task["stage"] in CONTROLS:
        return getattr(import_module("tests.benchmarks.controls"), task["stage"]), task["params"]
    definition = stage(task["stage"])
    return definition.run, definition.params.model_validate(task["params"])


def score(task: Task, tell: JsonLines) -> dict[str, Any]:
    """Perplexities and KL of a checkpoint of ours."""
    from stages.models.checkpoint.loading import load_model

    return _scored(load_model(Path(task["model"])), load_model(Path(task["dense"])), task, tell)


def peer(task: Task, tell: JsonLines) -> dict[str, Any]:
    """A published tool on the dense model, and its scores. Loading is counted, as in ours; saving is left out."""
    model, _, done = _by_peer(task)
    return done | _scored(model, _plain(task["dense"]), task, tell)


def peer_saved(task: Task, tell: JsonLines) -> dict[str, Any]:
    """What a published tool makes of the dense model, as a checkpoint that `fetch` reads."""
    from stages.models.checkpoint.layout import carry, travelling

    model, asked, done = _by_peer(task)
    assert asked.save is not None
    asked.save(model, Path(task["output"]))
    carry(Path(task["dense"]), Path(task["output"]), travelling(Path(task["dense"])))
    return done


def peer_lent(task: Task, tell: JsonLines) -> dict[str, Any]:
    """What a published tool makes of the dense model, served to who asks; see `lent`."""
    from tests.benchmarks.lent import serve

    model, asked, _ = _by_peer(task)
    tell.send(event="ready", size_bytes=_stored(model, Path(task["dense"]), asked.bits))
    serve(model, Path(task["folder"]), sys.stdin, tell)
    return {}


def peer_asked(task: Task, tell: JsonLines) -> dict[str, Any]:
    """What such a model answers, asked by our libraries: reports as `validate` writes them."""
    from tests.benchmarks.asked import reports
    from tests.benchmarks.lent import borrowed

    with borrowed({**task, "do": "peer lent"}, task["python"]) as (lent, told):
        found = reports(lent, Path(task["dense"]), task["asks"], tell)
    for one in found.values():
        one["measures"]["size_bytes"] = told["size_bytes"]
    return {"reports": found}


def _stored(model: Any, dense: Path, bits: float | None) -> float:
    """Bytes of the dense checkpoint with the maps of its blocks in as many bits as a tool says."""
    from torch import nn

    whole = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    maps = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
    wide = sum(one.weight.numel() * one.weight.element_size() for one in maps)
    return float(whole) if bits is None else whole - wide + sum(one.weight.numel() for one in maps) * bits / 8


def _by_peer(task: Task) -> tuple[Any, Any, dict[str, Any]]:
    """The model, the peer, and what it took."""
    began = time.monotonic()
    import torch
    from safetensors.torch import load_file

    from tests.benchmarks.peers import PEERS

    asked = next(one for one in PEERS if one.name == task["peer"])
    import_module(asked.module)
    imported = time.monotonic()
    ids_NT = load_file(task["windows"])["calibrate"][: task["calibration"] or asked.windows]
    model = asked.apply(_plain(task["dense"]), ids_NT)
    torch.set_grad_enabled(True)
    return (
        model,
        asked,
        {
            "seconds": time.monotonic() - imported,
            "import_seconds": imported - began,
            "peak_rss_bytes": peak_rss_bytes(),
            "tool": f"{asked.distribution} {version(asked.distribution)}, {len(ids_NT)} windows",
            "metrics": {} if asked.bits is None else {"bits_per_weight": asked.bits},
        },
    )


def _plain(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _scored(model: Any, dense: Any, task: Task, tell: JsonLines) -> dict[str, float]:
    from safetensors.torch import load_file

    from tests.benchmarks.scoring import score as figures

    found = load_file(task["windows"])
    kl_windows = int(task["kl_windows"])
    return figures(
        lambda ids: model(input_ids=ids, use_cache=False).logits,
        lambda ids: dense(input_ids=ids, use_cache=False).logits,
        {name: found[name] for name in TEXTS},
        kl_windows,
        tell.advanced,
    )


TASKS = {
    "windows": windows,
    "run": run,
    "score": score,
    "peer": peer,
    "peer saved": peer_saved,
    "peer lent": peer_lent,
    "peer asked": peer_asked,
}


def main(path: str, stream: TextIO) -> None:
    """Do the task of a file and write its result, or what a stage refused, as the last line."""
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    tell = JsonLines(stream)
    try:
        tell.send(event="result", result=TASKS[task["do"]](task, tell))
    except StageError as error:
        tell.send(event="failed", said=str(error))


if __name__ == "__main__":
    alone = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(sys.argv[1], alone)
