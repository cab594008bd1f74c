"""Measure one artifact on one corpus or set of items, on one executor: perplexity, distance, right answers, size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.adapters.targets import CUDA, refuse_unexecuted
from stages.measures.items import HARNESS, ItemSplits, holds_harness, holds_items
from stages.runtime.contract import Divided, Image, Input, Kind, Metrics, Progress, Stage, StageError
from stages.runtime.parts import FOLDER, gaps, keep, kept
from stages.validate.params import (
    ValidateParams,
    check_asked_of_text,
    check_beams,
    check_harness,
    chosen_code,
    chosen_image,
    executed_on,
)

if TYPE_CHECKING:
    from stages.measures.documents import Document
    from stages.models.checkpoint.subject import Subject
    from stages.validate.harness import HarnessTask
    from stages.validate.questions import Questions
    from stages.validate.text import Text

    Asked = Text | Questions | HarnessTask

KEPT_UNITS = 8
"""A run that was killed computes at most so many windows, or groups of items, again."""


def validate(params: ValidateParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Score every window or group of items that no part holds yet, and write `report.json`."""
    from stages.measures.size import size_bytes

    model = inputs["model"]
    asked = _asked(params, inputs, progress)
    found = asked.report(_all_scores(params, inputs, asked, output / FOLDER, progress))
    files = {p.relative_to(model).as_posix(): p.stat().st_size for p in model.rglob("*") if p.is_file()}
    found["measures"] |= {"size_bytes": float(size_bytes(files))}
    report = {
        "artifact_target": params.target,
        "split": params.split,
        "task": asked.task,
        "corpus": _corpus_digest(inputs["text"]),
    }
    (output / "report.json").write_text(json.dumps(report | found, indent=1, allow_nan=False), encoding="utf-8")
    return {**found["measures"], **asked.metrics(found["documents"])}


def count_units(params: ValidateParams, inputs: Mapping[str, Path]) -> int:
    """How many windows or groups of items are scored, each by itself."""
    return len(_asked(params, inputs))


def score_part(params: ValidateParams, inputs: Mapping[str, Path], span: range, progress: Progress) -> bytes:
    """The scores of some windows or groups, as `validate` gathers them."""
    asked = _asked(params, inputs)
    if span.stop > len(asked):
        raise StageError(f"the part ends behind the last of the {asked.units}", measured=span.stop, limit=len(asked))
    units = []
    for unit in _scorer(params, inputs, asked)(span):
        units.append(unit)
        progress.advanced(len(units), len(span))
    return _written(units)


def _all_scores(
    params: ValidateParams, inputs: Mapping[str, Path], asked: Asked, folder: Path, progress: Progress
) -> list[list[Document]]:
    """Every unit's scores: those of the parts in `folder`, and the others computed and kept there as they come."""
    scored = _kept_scores(asked, folder, "baseline" in inputs, progress)
    if scored:
        progress.note(f"{len(scored)} of {len(asked)} {asked.units} are scored already")
        progress.advanced(len(scored), len(asked))
    missing = gaps(len(asked), [range(index, index + 1) for index in scored], KEPT_UNITS)
    score = _scorer(params, inputs, asked) if missing else None
    for span in missing:
        assert score is not None
        for index, unit in zip(span, score(span), strict=True):
            scored[index] = unit
            progress.advanced(len(scored), len(asked))
        keep(folder, span, _written([scored[index] for index in span]))
    return [scored[index] for index in range(len(asked))]


def _kept_scores(asked: Asked, folder: Path, paired: bool, progress: Progress) -> dict[int, list[Document]]:
    scored: dict[int, list[Document]] = {}
    for span, data in kept(folder):
        units = asked.read(data, span, paired=paired)
        if units is None or len(units) != len(span):
            progress.note(
                f"the scores of {asked.units} {span.start} to {span.stop - 1} are not of this corpus: made anew"
            )
        else:
            scored |= dict(zip(span, units, strict=True))
    return scored


def _asked(params: ValidateParams, inputs: Mapping[str, Path], progress: Progress | None = None) -> Asked:
    from stages.models.anatomy import tasks
    from stages.models.checkpoint.loading import load_config, load_tokenizer
    from stages.validate.questions import questions_of
    from stages.validate.text import text_of

    if baseline := inputs.get("baseline"):
        ours, theirs = (load_tokenizer(one).get_vocab() for one in (inputs["model"], baseline))
        _check_alike(ours, theirs, *(tasks.task(load_config(one)) for one in (inputs["model"], baseline)))
    check_harness(params, holds_harness(inputs["text"]))
    if params.harness:
        from stages.validate.harness import harness_of

        return harness_of(params, inputs)
    if holds_items(inputs["text"]):
        return questions_of(params, inputs, progress)
    check_asked_of_text(params)
    return text_of(params, inputs, progress)


def admit(params: ValidateParams, known: Mapping[str, Any]) -> Subject:
    """The model that is judged, if it can be, where it is to be."""
    if params.target == CUDA:
        from stages.adapters.torch_gpu import require_gpu

        require_gpu()
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.checkpoint.pooling import pooled
    from stages.models.checkpoint.subject import vocabularies
    from stages.models.text.windows import check_split
    from stages.validate.questions import check_task
    from stages.validate.text import check_length, mask_of

    check_split(known, params.split)
    model: Subject = known["model"]
    refuse_unexecuted(params.target, model.precisions)
    pooled(model.folder)
    if model.task == "fill":
        mask_of(load_tokenizer(model.folder))
    if baseline := known.get("baseline"):
        _check_alike(*vocabularies(model, baseline), model.task, baseline.task)
    if isinstance(text := known.get("text"), ItemSplits):
        check_task(model.task, text.tasks)
        check_beams(params, model.task)
        check_harness(params, HARNESS in text.tasks)
    else:
        check_asked_of_text(params)
        check_length(model.built, min(params.window_tokens, model.reads or params.window_tokens))
    return model


def _scorer(
    params: ValidateParams, inputs: Mapping[str, Path], asked: Asked
) -> Callable[[range], Iterator[list[Document]]]:
    """Load the model and its baseline; returns a range of units -> their scores."""
    from stages.serving.engine import open_engine

    baseline = inputs.get("baseline")
    # Of checkpoints; beside an engine the baseline computes on the processor.
    device = "cuda" if params.target == CUDA else "cpu"
    # An input's every byte was hashed against its manifest.
    judged = open_engine(inputs["model"], verified=True, device=device)
    if judged.target != params.target:
        raise StageError(
            "the artifact is executed on another target than the one asked for",
            measured=judged.target,
            limit=params.target,
            remedy=f"Set the step's parameter `target` to {judged.target}.",
        )
    return asked.scorer(judged, open_engine(baseline, verified=True, device=device) if baseline else None)


def _written(units: list[list[Document]]) -> bytes:
    return json.dumps(units, allow_nan=False).encode()


def _check_alike(ours: Mapping[str, int], theirs: Mapping[str, int], task: str, other: str) -> None:
    from stages.measures.documents import other_vocabulary

    if len(ours) != len(theirs):
        raise other_vocabulary(len(theirs), len(ours))
    if token := next((one for one in sorted(ours) if theirs.get(one) != ours[one]), None):
        raise StageError(
            "the baseline has another vocabulary than the model, so their predictions cannot be compared",
            measured=f"{token!r} is token {theirs.get(token, 'none')}",
            limit=f"token {ours[token]} as in the model's own",
            remedy="Name the checkpoint the model was made from as baseline, and give both its tokenizer.",
        )
    if other != task:
        raise StageError(
            "the baseline answers something else than the model, so they cannot be compared",
            measured=f"its task is {other}",
            limit=f"the model's own, {task}",
            remedy="Name the checkpoint the model was made from as baseline, or judge without one.",
        )


def _corpus_digest(corpus: Path) -> str:
    path = corpus / "corpus.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("digest", "")) if path.is_file() else ""


VALIDATE = Stage(
    name="validate",
    params=ValidateParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE})),
        "text": Input(kinds=frozenset({Kind.CORPUS})),
        "baseline": Input(kinds=frozenset({Kind.CHECKPOINT}), optional=True),
        "seen": Input(kinds=frozenset({Kind.CORPUS}), optional=True, many=True),
    },
    output=Kind.REPORT,
    image=Image.TORCH,
    run=validate,
    admit=admit,
    executed_on=executed_on,
    uses=chosen_code,
    chosen_image=chosen_image,
    divided=Divided(count=count_units, part=score_part),
)
