"""How much memory a stage takes of a checkpoint of 1.1 billion drawn parameters in bfloat16, measured from outside.

Two figures of each child: the largest resident set, in which pages of mapped files count though the kernel takes them
back at will, and the largest part of it that is the process's own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.reporting.terminal import TerminalProgress
from flows.running.child_environment import child_environment
from stages import stage
from stages.adapters.connect import pins
from stages.runtime.artifacts import Store
from stages.runtime.execute import execute, work_of
from stages.runtime.fingerprint import ROOT
from stages.runtime.progress import Silent, forward
from tests.benchmarks.bench import SPLITS
from tests.benchmarks.results import Row

NAME = "memory"
LIMIT_BYTES = 2.5e9
THREADS = 2
SHARD_BYTES = 400_000_000
_EVERY_S = 0.02
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "zeros.json")
"""Of a checkpoint in shards the index is a part; of a pruned one, what counts its zeros."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: TinyLlama's by default."""

    hidden: int = 2048
    channels: int = 5632
    blocks: int = 22
    heads: int = 32
    groups: int = 4
    vocabulary: int = 32000
    tied: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of their blocks."""
        width = self.hidden // self.heads * self.groups
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index in range(self.blocks):
            block = f"model.layers.{index}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{block}.{name}.weight", (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", width), ("v", width), ("o", self.hidden)):
                yield f"{block}.self_attn.{name}_proj.weight", (rows, self.hidden)
            for name in ("gate", "up"):
                yield f"{block}.mlp.{name}_proj.weight", (self.channels, self.hidden)
            yield f"{block}.mlp.down_proj.weight", (self.hidden, self.channels)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


MODELS = {"billion": Shape(), "tied": Shape(blocks=4, vocabulary=151_936, tied=True)}
"""The tied one has the table of a Qwen2: a third of a billion parameters in one tensor."""

_FEW = {"windows": 2, "window_tokens": 64}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-plain": ("quantize", {"scheme": "int4_weight_only", "search": "off"}),
    "int8": ("quantize", {"scheme": "int8_weight_only"}),
    "magnitude-2:4": ("prune", {"method": "magnitude", "pattern": "2:4", **_FEW}),
}
"""Name -> stage and params, of those that take about a minute."""


def measured(store: Store, terminal: TerminalProgress, *, text: str, names: Mapping[str, Shape] = MODELS) -> list[Row]:
    """A row for each way and model."""
    corpus = _corpus(store, text)
    rows = []
    for name, shape in names.items():
        model = drawn(store.scratch / "bench" / NAME / name, shape)
        rows += [row(model, corpus, way, terminal) for way in WAYS]
    return rows


def drawn(folder: Path, shape: Shape) -> Path:
    """A checkpoint of drawn weights in bfloat16, made shard by shard; one that stands is taken."""
    if folder.is_dir():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from tests.tiny import reference_text, tiny_tokenizer

    made = folder.with_suffix(f".{os.getpid()}")
    made.mkdir(parents=True)
    generator, places = torch.Generator().manual_seed(0), dict[str, str]()
    for number, names in enumerate(_shards(shape)):
        # Drawn as a training leaves them: a stream that neither dies nor overflows.
        tensors = {
            name: torch.ones(size) if len(size) == 1 else torch.empty(size).normal_(0, 0.02, generator=generator)
            for name, size in names.items()
        }
        file = f"model-{number:05d}.safetensors"
        save_file({name: one.bfloat16() for name, one in tensors.items()}, made / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = sum(2 * math.prod(one) for _, one in shape.tensors())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (made / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.channels,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        tie_word_embeddings=shape.tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(made)
    tiny_tokenizer(reference_text()).save_pretrained(made)
    made.rename(folder)
    return folder


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, size in shape.tensors():
        if shard and 2 * sum(map(math.prod, (*shard.values(), size))) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = size
    yield shard


def _corpus(store: Store, text: str) -> Path:
    definition = stage("corpus")
    made = definition.params.model_validate({"source": text, "splits": SPLITS["text"]})
    if definition.pin:
        made = definition.pin(made, pins(store), Silent())
    return store.checkout(execute(definition, made, work_of(definition, made, {}), store, Silent()).identity)


def row(model: Path, corpus: Path, way: str, terminal: TerminalProgress) -> Row:
    """What one stage takes of one checkpoint, in a process as the product starts it; what it writes goes."""
    verb, params = WAYS[way]
    name, output = f"{way} of {model.name}", model.parent / "written"
    terminal.started(name)
    shutil.rmtree(output, ignore_errors=True)
    task = {
        "do": "run",
        "stage": verb,
        "params": params,
        "inputs": {"model": str(model), "text": str(corpus)},
        "output": str(output),
    }
    path, began = model.parent / "task.json", time.monotonic()
    path.write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", "tests.benchmarks.child", str(path)]
    last: dict[str, Any] = {}
    with (
        (model.parent / f"{way}.log").open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=child_environment(verb, THREADS)
        ) as child,
    ):
        own = _Own(child.pid)
        for line in child.stdout or ():
            last = json.loads(line)
            forward(last, terminal.for_step(name))
        own.end()
    sizes = [sum(file.stat().st_size for form in _WEIGHTS for file in one.glob(form)) for one in (model, output)]
    shutil.rmtree(output, ignore_errors=True)
    if last.get("event") != "result":
        terminal.failed(name, said := str(last.get("said", f"exit {child.returncode}")))
        return Row(name, error=said)
    terminal.finished(name, time.monotonic() - began, cached=False)
    return _row(name, last["result"], own.peak_bytes, sizes)


def _row(name: str, found: Mapping[str, Any], own_bytes: float, sizes: list[int]) -> Row:
    figures = {key: float(found[key]) for key in ("seconds", "import_seconds", "peak_rss_bytes")}
    figures |= {"size_bytes": float(sizes[1]), "own_peak_bytes": own_bytes}
    peak = figures["peak_rss_bytes"]
    about = f"{peak / 1e9:.2f} GB resident, {own_bytes / 1e9:.2f} GB of it no file's; {sizes[0] / 1e9:.2f} GB came in"
    wrong = [f"above {LIMIT_BYTES / 1e9:.1f} GB"] if peak > LIMIT_BYTES else []
    wrong += ["more was written than came in"] if sizes[1] > sizes[0] else []
    return Row(name, figures=figures, about=about, error=f"{', '.join(wrong)}: {about}" if wrong else "")


class _Own:
    """The largest amount of memory of a process that no file holds, looked at every few hundredths of a second."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0.0
        self._status, self._ended = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(_EVERY_S):
            try:
                lines = self._status.read_text(encoding="utf-8").splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
            self.peak_bytes = max(self.peak_bytes, *found, 0.0)

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()
