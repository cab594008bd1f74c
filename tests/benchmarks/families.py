"""Which family of models goes through which technique, and how near the dense model it stays: a table.

`make families` runs every cell on tiny random checkpoints of the family and prints the table, and with ARGS=--write
puts it into README. A cell is the KL divergence from the dense model in nats, the median of three checkpoints, `yes`
where there is none, or `no`, with the reason below the table. Graph, engine and plan are those of the first checkpoint.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from stages import stage
from stages.adapters.sources import local_path
from stages.measures.documents import score_documents, summary
from stages.measures.predictions import Asking
from stages.models.checkpoint.loading import load_tokenizer
from stages.models.text.windows import windows
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.serving.eager import eager
from stages.serving.engine import open_engine
from tests.stages.models.families import VOCABULARY, family

ROWS = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma": "gemma", "Gemma 2": "gemma2",
    "Gemma 3": "gemma3", "Phi-3": "phi3", "OPT": "opt", "GPT-2": "gpt2", "GPT-NeoX": "neox", "Falcon": "falcon",
    "BLOOM": "bloom", "SmolLM3": "smollm3", "Granite": "granite", "Mixtral": "mixtral", "BERT": "bert_masked",
    "RoBERTa": "roberta", "DistilBERT": "distilbert", "ELECTRA": "electra", "ALBERT": "albert",
    "DeBERTa": "deberta", "T5": "t5", "BART": "bart", "mBART": "mbart", "Marian": "marian",
}  # fmt: skip
"""As people call it -> the checkpoint of the tests."""
PAGE, MARK, WRITE = Path(__file__).parents[2] / "README.md", "<!-- families -->", "--write"
DRAWS = 3
EQUAL = 1e-6
"""Nats: what rounding of sums makes of equal models."""
MOST = 3
"""Times the distance of the same technique on the Llama: beyond it, a technique does not suit a family."""
FEW = {"windows": 4, "window_tokens": 32}
CELLS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "channels": ("prune", {"method": "channels", "keep": 0.95, "multiple": 1, **FEW}),
    "heads": ("prune", {"method": "heads", "keep": 0.9, **FEW}),
    "blocks": ("prune", {"method": "blocks", "keep": 0.7, **FEW}),
    "2:4": ("prune", {"method": "wanda", "pattern": "2:4", **FEW}),
    "factorize": ("factorize", {"keep": 0.9, **FEW}),
    "share": ("share", {"method": "basis", "keep": 0.9, **FEW}),
    "W8A8": ("quantize", {"scheme": "int8_w8a8", **FEW}),
    "INT8": ("quantize", {"scheme": "int8_weight_only"}),
    "INT4": ("quantize", {"scheme": "int4_weight_only", "block": 16, **FEW}),
    "FP8": ("quantize", {"scheme": "fp8_e4m3", **FEW}),
    "NVFP4": ("quantize", {"scheme": "nvfp4", **FEW}),
}
RUN = ("graph", "engine", "plan")
"""The ONNX graph and the engine for the processor, executed, and a TensorRT-RTX plan, built with the cache."""
COLUMNS = ("fetch", "judge", "tie", *CELLS, "recover", "fuse", *RUN)


@dataclass(frozen=True)
class Cell:
    """One technique on one family: how far from dense, or why not."""

    distance: float | None = None
    why: str = ""


def text(root: Path) -> Path:
    """A corpus of the reference prose."""
    folder = root / "text"
    if not folder.is_dir():
        folder.mkdir()
        definition = stage("corpus")
        splits = {"calibrate": 0.3, "train": 0.3, "validate": 0.2, "test": 0.2}
        params = definition.params.model_validate({"source": "pydoc://topics", "splits": splits})
        definition.run(params, {}, folder, Silent())
    return folder


def checkpoint(name: str, root: Path, draw: int = 0) -> Path:
    """A family's tiny checkpoint with a tokenizer of single characters."""
    folder = family(name, root, draw)
    if not (folder / "tokenizer.json").is_file():
        characters = ["[UNK]", "[MASK]", "[PAD]", *(chr(32 + number) for number in range(VOCABULARY - 3))]
        made = Tokenizer(WordLevel({one: number for number, one in enumerate(characters)}, unk_token="[UNK]"))
        made.pre_tokenizer = Split(Regex(r"."), "isolated")
        PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]", pad_token="[PAD]"
        ).save_pretrained(folder)
    return folder


def row(name: str, root: Path) -> dict[str, Cell]:
    """Every cell of a family: the median of its draws, since one of so small a model is up to five times off."""
    draws = [_row(name, root, draw) for draw in range(DRAWS)]
    cells = {column: _median([one[column] for one in draws]) for column in COLUMNS if column not in RUN}
    return cells | run_elsewhere(checkpoint(name, root), root)


def _median(cells: list[Cell]) -> Cell:
    refused = [one for one in cells if one.distance is None]
    return refused[0] if refused else sorted(cells, key=lambda one: one.distance or 0.0)[len(cells) // 2]


def _row(name: str, root: Path, draw: int) -> dict[str, Cell]:
    dense = checkpoint(name, root, draw)
    cells = {"fetch": _cell(lambda out: _fetched(dense, out), dense, root)}
    cells["judge"] = _cell(lambda out: dense, dense, root)
    cells["tie"] = _tied(dense, root)
    for column, (verb, params) in CELLS.items():
        cells[column] = _cell(lambda out, verb=verb, params=params: _made(verb, params, dense, root, out), dense, root)
    cells["recover"] = _cell(lambda out: _recovered(dense, root, out), dense, root)
    cells["fuse"] = _cell(lambda out: _fused(dense, root, out), dense, root)
    return cells


def run_elsewhere(dense: Path, root: Path) -> dict[str, Cell]:
    """What other runtimes make of the dense checkpoint."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        places = {name: Path(folder, name) for name in RUN}
        ways: Mapping[str, tuple[str, dict[str, Any], str, Path]] = {
            "graph": ("export", {}, "model", dense),
            "engine": ("compile", {"backend": "onnxruntime"}, "graph", places["graph"]),
            "plan": ("compile", {"backend": "tensorrt_rtx", "architectures": ["sm_89"]}, "graph", places["graph"]),
        }
        cells: dict[str, Cell] = {}
        for name, (verb, params, role, source) in ways.items():
            if role == "graph" and cells["graph"].distance is None:
                cells[name] = cells["graph"]
                continue
            places[name].mkdir()
            definition = stage(verb)
            try:
                given = definition.params.model_validate(params)
                definition.run(given, {role: source}, places[name], Silent())
                cells[name] = _plan(places) if name == "plan" else Cell(distance(dense, places[name], root))
            except StageError as error:
                cells[name] = Cell(why=error.what)
    return cells


def _plan(places: Mapping[str, Path]) -> Cell:
    """A plan was built; it keeps what it has read where its graph does."""
    graph, engine = (
        json.loads((places[name] / file).read_text(encoding="utf-8"))
        for name, file in (("graph", "graph.json"), ("plan", "engine.json"))
    )
    lost = graph["cache"] and not engine["cache"]
    return (
        Cell(why="the builder refuses its cache, and the plan reads the whole text for each token")
        if lost
        else Cell(0.0)
    )


def distance(dense: Path, made: Path, root: Path) -> float:
    """The KL divergence of a checkpoint's, a graph's or an engine's answers from the dense checkpoint's."""
    ours, theirs = open_engine(made) if (made / "model.onnx").is_file() else eager(made), eager(dense)
    tokenizer = load_tokenizer(dense)
    ids_NT = windows(text(root), "test", tokenizer, 32, most=4)
    asking = Asking(theirs.task, mask=tokenizer.mask_token_id)

    def asked(opened: Any) -> Callable[[Any], Any]:
        return lambda ids: opened.forward(ids, (ids >= 0).astype("int64"))

    return summary(list(score_documents(ids_NT, asked(ours), asked(theirs), asking, "test")))["kl_divergence"]


def _cell(make: Callable[[Path], Path], dense: Path, root: Path) -> Cell:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        out = Path(folder) / "out"
        out.mkdir()
        try:
            return Cell(distance(dense, make(out), root))
        except StageError as error:
            return Cell(why=error.what)


def _made(verb: str, params: Mapping[str, Any], model: Path, root: Path, out: Path, **more: Path) -> Path:
    definition = stage(verb)
    inputs = {"model": model, "text": text(root)} | more
    definition.run(definition.params.model_validate(dict(params)), inputs, out, Silent())
    return out


def _fetched(dense: Path, out: Path) -> Path:
    definition = stage("fetch")
    definition.run(definition.params.model_validate({"source": str(local_path(str(dense)))}), {}, out, Silent())
    return out


def _tied(dense: Path, root: Path) -> Cell:
    """A checkpoint two of whose matrices are equal; tying them changes nothing."""
    given = root / f"{dense.name}-equal"
    if not given.is_dir():
        copytree(dense, given)
        tensors = load_file(dense / "model.safetensors")
        shapes: dict[Any, str] = {}
        # Tables and heads are tied by the configuration; experts become one tensor.
        maps = [key for key in sorted(tensors) if not any(part in key for part in ("embed", "head", "wte", "expert"))]
        for key in maps:
            first = shapes.setdefault(tensors[key].shape, key)
            if tensors[key].ndim == 2 and first != key:
                tensors[key] = tensors[first].clone()
                break
        save_file(tensors, given / "model.safetensors", {"format": "pt"})
    return _cell(lambda out: _made("share", {"method": "tie"}, given, root, out), given, root)


def _recovered(dense: Path, root: Path, out: Path) -> Path:
    """Half the weights zeros, learned back."""
    pruned = out / "pruned"
    pruned.mkdir()
    _made(*CELLS["2:4"], dense, root, pruned)
    healed = out / "healed"
    healed.mkdir()
    params = {"tokens": 4096, "window_tokens": 32, "batch_windows": 4, "update": "sparse", "learning_rate": 1e-3}
    return _made("recover", params, pruned, root, healed, teacher=dense)


def _fused(dense: Path, root: Path, out: Path) -> Path:
    """The mean of a checkpoint and one that is a little off."""
    near, made = out / "near", out / "made"
    copytree(dense, near)
    made.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(dense / "model.safetensors")
    moved = {
        key: one + 0.002 * torch.randn(one.shape, generator=generator) if one.is_floating_point() else one
        for key, one in tensors.items()
    }
    save_file(moved, near / "model.safetensors", {"format": "pt"})
    definition = stage("fuse")
    definition.run(definition.params.model_validate({}), {"models.0": dense, "models.1": near}, made, Silent())
    return made


def shown(cell: Cell) -> str:
    """A cell as the table has it."""
    if cell.distance is None:
        return "no"
    return "yes" if cell.distance < EQUAL else f"{cell.distance:.2g}"


def table(cells: Mapping[str, Mapping[str, Cell]], before: str = "") -> str:
    """The table in Markdown, and below it each reason with where it stands.

    Args:
        cells: title -> column -> cell.
        before: such a table, of which the rows of other titles stay.
    """
    lines, reasons = dict[str, str](), dict[str, list[str]]()
    for line in before.splitlines():
        if line.startswith("| ") and not line.startswith("| family"):
            lines[line.split("|")[1].strip()] = line
        elif line.startswith("- "):
            where, _, why = line.removeprefix("- ").removesuffix(".").partition(": ")
            kept = [one for one in where.split(", ") if one.rpartition(" ")[0] not in cells]
            reasons |= {why: kept} if kept else {}
    for title, found in cells.items():
        lines[title] = f"| {title} | {' | '.join(shown(found[column]) for column in COLUMNS)} |"
        for column in COLUMNS:
            if found[column].distance is None:
                reasons.setdefault(_kind(found[column].why), []).append(f"{title} {column}")
    rows = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    rows += [lines[title] for title in ROWS if title in lines]
    return "\n".join(rows) + "\n\n" + "\n".join(f"- {', '.join(where)}: {why}." for why, where in reasons.items())


def far(cells: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Cells of a table that was read whose distance is beyond MOST times that of the same technique on the Llama."""
    near = {column: _number(text) for column, text in cells["Llama"].items()}
    return [
        f"{title} {column}: {text}, {_number(text) / near[column]:.1f} times"
        for title, row_of in cells.items()
        for column, text in row_of.items()
        if text != "no" and _number(text) > MOST * near[column]
    ]


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Title -> column -> cell of the table between the marks of a page."""
    lines = [one for one in text.split(MARK)[1].splitlines() if one.startswith("|")]
    columns, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {title: dict(zip(columns[1:], rest, strict=True)) for title, *rest in rows}


def _number(text: str) -> float:
    return EQUAL if text == "yes" else float(text)


def _kind(why: str) -> str:
    """A reason without the place and the class that it was met in."""
    return re.sub(r"\b\w+(\.\w+)*\.\d+(\.\w+)*|\b[A-Z]\w+(For|Model|Head)\w*", "…", why)


def main() -> int:
    """Print the table of the families that are named, or of all; `--write`: put these rows into README's."""
    asked = [one for one in sys.argv[1:] if one != WRITE]
    with tempfile.TemporaryDirectory() as folder:
        cells = {}
        for title in asked or ROWS:
            cells[title] = row(ROWS[title], Path(folder))
            sys.stderr.write(f"{title}: {sum(one.distance is not None for one in cells[title].values())} yes\n")
    made = table(cells)
    sys.stdout.write(made + "\n")
    if "Llama" in cells:
        beyond = far({title: {column: shown(one) for column, one in found.items()} for title, found in cells.items()})
        sys.stdout.write(f"\nbeyond {MOST} times the Llama's: {'; '.join(beyond) or 'none'}\n")
    if WRITE in sys.argv:
        before, old, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(f"{before}{MARK}\n{table(cells, old if asked else '')}\n{MARK}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
