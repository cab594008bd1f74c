"""Measure one artifact on one corpus on one executor: perplexity, distance from a baseline, size."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError
from stages.runtime.execute import device_name

if TYPE_CHECKING:
    from torch import Tensor

Document = dict[str, Any]


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
    from stages.measures.size import size_bytes
    from stages.models.loading import load_tokenizer
    from stages.models.windows import windows
    from stages.serving.engine import open_engine

    model, corpus, baseline = inputs["model"], inputs["text"], inputs.get("baseline")
    if baseline:
        _check_vocabulary(model, baseline)
    _check_length(model, params.window_tokens)
    ids_NT = windows(corpus, params.split, load_tokenizer(model), params.window_tokens, most=params.windows)
    judged = open_engine(model)
    if judged.target != params.target:
        raise StageError(
            "the artifact is executed on another target than the one asked for",
            measured=judged.target,
            limit=params.target,
            remedy=f"Set the step's parameter `target` to {judged.target}.",
        )
    scored = _scores(ids_NT, judged, open_engine(baseline) if baseline else None, params.split)
    documents: list[Document] = []
    for document in scored:
        documents.append(document)
        progress.advanced(len(documents), len(ids_NT))
    files = {p.relative_to(model).as_posix(): p.stat().st_size for p in model.rglob("*") if p.is_file()}
    measures = _measures(documents) | {"size_bytes": float(size_bytes(files))}
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


def _scores(ids_NT: Tensor, judged: Any, baseline: Any | None, split: str) -> Iterator[Document]:
    """The scores of one window after another: two arrays of logits at a time, never more."""
    import torch

    from stages.measures.divergence import kl_divergence, top1_agreement
    from stages.measures.perplexity import negative_log_likelihood

    for index, ids_T in enumerate(ids_NT):
        # The digest names the tokens, so that reports over other text or another tokenizer cannot be paired.
        name = f"{split}-{index:05d}-{hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()[:12]}"
        window = ids_T[None].numpy()
        logits_TV = torch.from_numpy(judged.logits(window)[0, :-1])
        nll_T = negative_log_likelihood(logits_TV, ids_T[1:])
        document: Document = {"id": name, "tokens": len(nll_T), "nll": float(nll_T.sum())}
        _refuse_nonfinite(document, "nll", "the model")
        if baseline is not None:
            dense_TV = torch.from_numpy(baseline.logits(window)[0, :-1])
            if dense_TV.shape != logits_TV.shape:
                raise _other_vocabulary(dense_TV.shape[-1], logits_TV.shape[-1])
            document["kl"] = float(kl_divergence(dense_TV, logits_TV).sum())
            document["agree"] = int(top1_agreement(dense_TV, logits_TV).sum())
            _refuse_nonfinite(document, "kl", "the model or its baseline")
        yield document


def _refuse_nonfinite(document: Document, score: str, whose: str) -> None:
    if not math.isfinite(document[score]):
        raise StageError(
            f"{whose} gave logits on document {document['id']} that are no distribution",
            measured=f"{score} {document[score]}",
            limit="finite",
            remedy="Look for NaN or overflow in the step that made the model: judge its input checkpoint the same way.",
        )


def _measures(documents: list[Document]) -> Metrics:
    from stages.measures.perplexity import perplexity

    tokens = [document["tokens"] for document in documents]
    measures = {"perplexity": perplexity([document["nll"] for document in documents], tokens)}
    if not math.isfinite(measures["perplexity"]):
        raise StageError("the perplexity is beyond float64", measured=measures["perplexity"], limit="finite")
    if "kl" in documents[0]:
        measures["kl_divergence"] = math.fsum(document["kl"] for document in documents) / sum(tokens)
        measures["top1_agreement"] = sum(document["agree"] for document in documents) / sum(tokens)
    return measures


def _check_vocabulary(model: Path, baseline: Path) -> None:
    from stages.models.loading import load_tokenizer

    ours, theirs = load_tokenizer(model).get_vocab(), load_tokenizer(baseline).get_vocab()
    if ours != theirs:
        raise _other_vocabulary(len(theirs), len(ours))


def _other_vocabulary(theirs: int, ours: int) -> StageError:
    return StageError(
        "the baseline has another vocabulary than the model, so their predictions cannot be compared",
        measured=f"{theirs} tokens",
        limit=f"the model's own {ours}",
        remedy="Name the checkpoint the model was made from as baseline, or judge without one.",
    )


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
