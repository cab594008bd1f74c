"""Measure one artifact on one corpus on one executor: perplexity, distance from a baseline, size."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError
from stages.runtime.execute import device_name


class ValidateParams(Params):
    """What is measured, and where.

    Attributes:
        split: the corpus split that is scored.
        window_tokens: length of a window; one window is one document.
        windows: at most this many windows, the first ones; None for all.
        target: what the model is executed on; it must be the artifact's own.
    """

    split: Literal["calibrate", "train", "validate", "test"] = "test"
    window_tokens: int = Field(512, ge=2)
    windows: int | None = Field(None, ge=1)
    target: Literal["torch:cpu", "onnxruntime:cpu"] = "torch:cpu"


def executed_on(params: ValidateParams) -> dict[str, str]:
    """The machine and library that the scores are a fact about."""
    library = params.target.partition(":")[0]
    return {
        "target": params.target,
        "device": device_name(),
        "runtime": f"{library} {importlib.metadata.version(library)}",
    }


def validate(params: ValidateParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Score every window and write `report.json`."""
    from stages.measures.documents import Document, score_documents, summary
    from stages.measures.size import size_bytes
    from stages.models.loading import load_tokenizer
    from stages.models.windows import windows
    from stages.serving.engine import open_engine

    model, corpus, baseline = inputs["model"], inputs["text"], inputs.get("baseline")
    if baseline:
        _check_vocabulary(model, baseline)
    _check_length(model, params.window_tokens)
    ids_NT = windows(corpus, params.split, load_tokenizer(model), params.window_tokens, most=params.windows)
    judged = open_engine(model, verified=True)  # an input's every byte was hashed against its manifest
    if judged.target != params.target:
        raise StageError(
            "the artifact is executed on another target than the one asked for",
            measured=judged.target,
            limit=params.target,
            remedy=f"Set the step's parameter `target` to {judged.target}.",
        )
    dense = open_engine(baseline, verified=True).logits if baseline else None
    documents: list[Document] = []
    for document in score_documents(ids_NT, judged.logits, dense, params.split):
        documents.append(document)
        progress.advanced(len(documents), len(ids_NT))
    files = {p.relative_to(model).as_posix(): p.stat().st_size for p in model.rglob("*") if p.is_file()}
    measures = summary(documents) | {"size_bytes": float(size_bytes(files))}
    report = {
        "artifact_target": judged.target,
        "split": params.split,
        "window_tokens": params.window_tokens,
        "corpus": _corpus_digest(corpus),
        "documents": documents,
        "measures": measures,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    return measures | {"tokens": float(sum(document["tokens"] for document in documents))}


def _check_vocabulary(model: Path, baseline: Path) -> None:
    from stages.measures.documents import other_vocabulary
    from stages.models.loading import load_tokenizer

    ours, theirs = load_tokenizer(model).get_vocab(), load_tokenizer(baseline).get_vocab()
    if ours != theirs:
        raise other_vocabulary(len(theirs), len(ours))


def _check_length(model: Path, window_tokens: int) -> None:
    engine, config = model / "engine.json", model / "config.json"
    path, key = (engine, "maximum_tokens") if engine.is_file() else (config, "max_position_embeddings")
    most = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
    if most is not None and window_tokens > most:
        raise StageError(
            "the windows are longer than the model can read",
            measured=f"{window_tokens} tokens",
            limit=f"{most} tokens",
            remedy="Lower `window_tokens`.",
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
    },
    output=Kind.REPORT,
    image=Image.TORCH,
    run=validate,
    executed_on=executed_on,
)
