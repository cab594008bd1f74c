"""What every stage that changes a checkpoint's maps begins and ends with: the model, its text, the table, the proof.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from stages.models.anatomy import tasks
from stages.models.anatomy.blocks import block_parameters
from stages.models.checkpoint import kept_zeros
from stages.models.checkpoint.files import stored_parameters
from stages.models.checkpoint.loading import load_config, load_model, load_tokenizer
from stages.models.layers.quantization_spec import describe
from stages.models.memory.pages import trim
from stages.models.text.windows import Windows, sliced_windows
from stages.runtime.contract import Metrics, Progress, StageError

TABLE = "layers.json"


def opened(folder: Path, verb: str, scratch: Path) -> PreTrainedModel:
    """The float model of a checkpoint that a stage is about to change; see `load_model`.

    Raises:
        StageError: it is quantized already.
    """
    model = load_model(folder, scratch=scratch)
    if describe(model) is not None:
        raise StageError("the checkpoint is quantized", remedy=f"{verb.capitalize()} first, quantize afterwards.")
    return model


def calibration(inputs: Mapping[str, Path], tokens: int, most: int, progress: Progress) -> Tensor:
    """ids_NT of `sliced_calibration`."""
    return sliced_calibration(inputs, tokens, most, progress).ids_NT


def sliced_calibration(inputs: Mapping[str, Path], tokens: int, most: int, progress: Progress) -> Windows:
    """Of the `calibrate` split, at most so many windows of so many tokens; fewer or shorter ones are noted.

    Windows are as long as the model reads where that is less.

    Raises:
        StageError: there is no text, or it is shorter than one window.
    """
    check_text(inputs)
    tokens = readable(inputs["model"], tokens, progress)
    tokenizer = load_tokenizer(inputs["model"])
    task = tasks.task(load_config(inputs["model"]))
    found = sliced_windows(inputs["text"], "calibrate", tokenizer, tokens, most=most, progress=progress, task=task)
    if len(found.ids_NT) < most:
        progress.note(f"the calibrate split gives {len(found.ids_NT)} of {most} windows")
    del tokenizer  # a vocabulary takes as much memory as a small model's block
    trim()
    return found


def check_text(inputs: Mapping[str, Any]) -> None:
    """Raise StageError where the text to calibrate with is missing."""
    if "text" not in inputs:
        raise StageError("this method needs an input 'text'", remedy="Give a corpus with a `calibrate` split.")


def readable(folder: Path, tokens: int, progress: Progress) -> int:
    """So many tokens, or as many as the checkpoint reads at once, which is noted."""
    most = tasks.longest(load_config(folder))
    if most is None or tokens <= most:
        return tokens
    progress.note(f"windows of {most} tokens, all that the model reads, not of {tokens}")
    return most


def matching(names: Sequence[str], layers: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The names that a pattern of `layers` matches and none of `skip`, in their order.

    A pattern is a path in the model, with `*` for anything: `model.layers.*.mlp.down_proj`, or `*.down_proj`.

    Raises:
        StageError: a pattern matches no name, or nothing is left.
    """
    if not names:
        raise StageError("the checkpoint has no layer left to change", limit="at least 1", remedy="Leave the step out.")
    for field, patterns in (("layers", layers), ("skip", skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise StageError(
                    f"the pattern {pattern!r} of `{field}` matches no layer",
                    measured=f"none of {len(names)}",
                    limit=f"paths like {names[0]} ... {names[-1]}",
                    remedy="Write `*` for any part of a path: '*.down_proj', 'model.layers.0.*'.",
                )
    found = [name for name in names if _any(name, layers) and not _any(name, skip)]
    if not found:
        raise StageError(
            "`layers` and `skip` leave nothing to do", measured=f"0 of {len(names)} layers", limit="at least 1"
        )
    return found


def write_table(output: Path, rows: list[dict[str, Any]], **head: str) -> None:
    """Write `layers.json`: what was asked, and a row a map."""
    (output / TABLE).write_text(json.dumps({**head, "layers": rows}, indent=1) + "\n", encoding="utf-8")


def proven(before: Path, blocks_before: int, output: Path, written: PreTrainedModel, limit: float) -> Metrics:
    """Parameters, and zeros where `prune` had put some, before and after, counted from the written checkpoint.

    Args:
        before: the checkpoint that came.
        blocks_before: parameters of its blocks.
        output: the one that was written.
        written: its model.
        limit: of the parameters of its blocks.

    Raises:
        StageError: it has more.
    """
    after = block_parameters(written)
    refuse_above(after, limit, "parameters in blocks")
    return {
        "block_parameters": float(after),
        "block_parameters_before": float(blocks_before),
        "parameters": float(stored_parameters(output)),
        "parameters_before": float(stored_parameters(before)),
        **kept_zeros.counted(before, written),
    }


def refuse_above(measured: int, limit: float, what: str) -> None:
    """Raise StageError if the written checkpoint has more of something than was asked."""
    if measured > limit:
        raise StageError(
            "the written checkpoint lost less than was asked",
            measured=f"{measured} {what}",
            limit=f"{limit:.0f}",
            remedy="This is a defect: please report it with the recipe.",
        )


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
