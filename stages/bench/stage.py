"""Measure how fast one artifact answers on one device, in turn with its baseline: tokens, first token, load, memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.adapters.targets import CUDA, on_gpu, refuse_unexecuted
from stages.bench.bytes_read import copy_bytes_per_s, weight_bytes
from stages.bench.child import WRITES
from stages.bench.figures import Cell, headline
from stages.bench.params import BenchParams, chosen_code, chosen_image, executed_on
from stages.bench.turns import Contestant, contestant
from stages.measures.items import ItemSplits
from stages.measures.table import SPEED
from stages.runtime.contract import Image, Input, Kind, Metrics, Progress, Stage, StageError

if TYPE_CHECKING:
    from stages.models.checkpoint.subject import Subject


def bench(params: BenchParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Have artifact and baseline answer the same prompts in turn, and write `report.json`."""
    _check_alike(inputs)
    device = "cuda" if on_gpu(params.target) else "cpu"  # of checkpoints: beside a plan, too, the same GPU's
    with ExitStack() as stack:
        opened: dict[str, Contestant] = {}
        for role in ("artifact", "baseline"):
            if role in inputs:
                opened[role] = stack.enter_context(contestant(role, inputs[role], device))
        _check_target(params, opened["artifact"])
        cells = _cells(params, inputs, opened, progress)
        copied = _take_turns(params, cells, opened, progress)
    about = {role: one.about for role, one in opened.items()}
    weights = {role: weight_bytes(inputs[role]) for role in opened}
    foremost = max((one for one in cells if one.batch == min(params.batches)), key=lambda one: one.prompt_tokens)
    said = headline(foremost, about, weights, copied)
    report = {
        "artifact_target": params.target,
        "task": about["artifact"]["task"],
        "split": params.split,
        "repeats": params.repeats,
        "executor": executed_on(params),
        "copy_bytes_per_s": copied,
        SPEED: said,
        "cells": [one.described() for one in cells],
    }
    (output / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    metrics: Metrics = dict(said["artifact"]["measures"])
    return metrics | {f"{name}_ratio": three[0] for name, three in said.get("ratios", {}).items()}


def _take_turns(
    params: BenchParams, cells: list[Cell], opened: Mapping[str, Contestant], progress: Progress
) -> float | None:
    """Fill the cells with rounds; returns the bytes that memory copies in a second, as of the middle round."""
    roles, copies = [*opened], list[float]()
    turns = params.repeats * len(cells) * len(roles)
    for turn in range(params.repeats):
        if not on_gpu(params.target):
            copies.append(copy_bytes_per_s(opened["artifact"].about["threads"]))
        for cell in cells:
            for role in roles:
                if not turn:
                    opened[role].asked(cell.prompts, min(2, cell.new_tokens))  # it warms up
                cell.rounds.setdefault(role, []).append(opened[role].asked(cell.prompts, cell.new_tokens))
            done = sum(len(rounds) for one in cells for rounds in one.rounds.values())
            progress.advanced(done, turns)
        roles.reverse()  # whoever goes second gets the machine as the first left it
    return statistics.median(copies) if copies else None


def _cells(
    params: BenchParams, inputs: Mapping[str, Path], opened: Mapping[str, Contestant], progress: Progress
) -> list[Cell]:
    """What is asked: prompts of each length in the smallest batch, then other batches at the shortest length."""
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.text.windows import windows

    most = min(int(one.about["maximum_tokens"]) for one in opened.values())
    writes = opened["artifact"].about["task"] in WRITES
    new = min(params.new_tokens, max(2, most // 2)) if writes else 0
    lengths = sorted({min(one, most - new) for one in params.prompt_tokens})
    if lengths != [*params.prompt_tokens] or (writes and new < params.new_tokens):
        shown = " and ".join(map(str, lengths))
        progress.note(f"prompts of {shown} tokens{f' and {new} new ones' if writes else ''}: a model reads {most}")
    tokenizer, smallest, cells = load_tokenizer(inputs["artifact"]), min(params.batches), list[Cell]()
    asked = [(smallest, length) for length in lengths]
    asked += [(batch, lengths[0]) for batch in params.batches if batch != smallest]
    for batch, length in asked:
        ids_NT = windows(inputs["text"], params.split, tokenizer, length, most=batch).tolist()
        prompts = [ids_NT[row % len(ids_NT)] for row in range(batch)]
        cells.append(Cell(batch, length, new, prompts))
    return cells


def _check_target(params: BenchParams, artifact: Contestant) -> None:
    if artifact.about["target"] != params.target:
        raise StageError(
            "the artifact is executed on another target than the one asked for",
            measured=artifact.about["target"],
            limit=params.target,
            remedy=f"Set the step's parameter `target` to {artifact.about['target']}.",
        )


def _check_alike(inputs: Mapping[str, Path]) -> None:
    """Refuse a baseline whose tokens are others: a token of one would not be a token of the other."""
    from stages.models.anatomy import tasks
    from stages.models.checkpoint.loading import load_config, load_tokenizer

    if (baseline := inputs.get("baseline")) is None:
        return
    ours, theirs = (load_tokenizer(one).get_vocab() for one in (inputs["artifact"], baseline))
    _refuse_another(ours, theirs, *(tasks.task(load_config(one)) for one in (inputs["artifact"], baseline)))


def _refuse_another(ours: Mapping[str, int], theirs: Mapping[str, int], task: str, other: str) -> None:
    remedy = "Name the checkpoint the model was made from as baseline, or measure without one."
    if ours != theirs:
        raise StageError(
            "the baseline has another vocabulary than the artifact, so tokens per second cannot be compared",
            measured=f"{len(theirs)} tokens" if len(ours) != len(theirs) else "the same number of other tokens",
            limit=f"the artifact's own {len(ours)}",
            remedy=remedy,
        )
    if other != task:
        raise StageError(
            "the baseline answers something else than the artifact, so they cannot be compared",
            measured=f"its task is {other}",
            limit=f"the artifact's own, {task}",
            remedy=remedy,
        )


def admit(params: BenchParams, known: Mapping[str, Any]) -> Subject:
    """The model that is measured, if it can be, where it is to be."""
    if params.target == CUDA:
        from stages.adapters.torch_gpu import require_gpu

        require_gpu()
    from stages.models.checkpoint.subject import vocabularies
    from stages.models.text.windows import check_split

    if isinstance(known.get("text"), ItemSplits):
        raise StageError(
            "prompts are taken from text, and this is a set of items",
            measured="a set of items",
            limit="a corpus of text",
            remedy="Name a step of `corpus`.",
        )
    check_split(known, params.split)
    artifact: Subject = known["artifact"]
    refuse_unexecuted(params.target, artifact.precisions)
    if baseline := known.get("baseline"):
        _refuse_another(*vocabularies(artifact, baseline), artifact.task, baseline.task)
    return artifact


BENCH = Stage(
    name="bench",
    params=BenchParams,
    inputs={
        "artifact": Input(kinds=frozenset({Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE})),
        "baseline": Input(kinds=frozenset({Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE}), optional=True),
        "text": Input(kinds=frozenset({Kind.CORPUS})),
    },
    output=Kind.REPORT,
    image=Image.TORCH,
    run=bench,
    admit=admit,
    executed_on=executed_on,
    uses=chosen_code,
    chosen_image=chosen_image,
)
