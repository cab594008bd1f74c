"""Scores of a model's predictions, one document after another.

Shapes: N documents of one window each, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.measures.perplexity import perplexity
from stages.measures.table import MEASURES, Measure
from stages.runtime.contract import Metrics, StageError

Predict = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [1, T] -> logits [1, T, V]."""


Document = dict[str, Any]
"""`id`, `tokens`, and sums over the predicted tokens, each under its measure's key; some need a baseline."""


def score_documents(
    ids_NT: Tensor, model: Predict, baseline: Predict | None, name: str, *, first: int = 0
) -> Iterator[Document]:
    """Score windows of tokens: the logits of one window at a time, of the model and of the baseline, and no more.

    Args:
        ids_NT: int64 tokens, one document a row.
        model: the judged model.
        baseline: what it is compared with.
        name: begins each document's id. The id ends in a digest of the tokens, so that scores of other text or of
            another tokenizer can never be paired with these.
        first: number of the first document, where these are a part of more.

    Raises:
        StageError: logits that are no distribution, or a baseline with another vocabulary.
    """
    functions = {one: _function(one) for one in MEASURES.values()}
    for index, ids_T in enumerate(ids_NT, start=first):
        window, next_T = ids_T[None].numpy(), ids_T[1:]
        # The last row predicts a token that nobody knows.
        logits_TV = torch.from_numpy(model(window)[0, :-1])
        document: Document = {"id": _id(name, index, ids_T), "tokens": len(next_T)}
        for one in _scored(paired=False):
            document[one.score] = _sum(one, functions[one](logits_TV, next_T), document, "the model")
        if baseline is not None:
            baseline_TV = torch.from_numpy(baseline(window)[0, :-1])
            if baseline_TV.shape != logits_TV.shape:
                raise other_vocabulary(baseline_TV.shape[-1], logits_TV.shape[-1])
            for one in _scored(paired=True):
                values_T = functions[one](baseline_TV, logits_TV)
                document[one.score] = _sum(one, values_T, document, "the model or its baseline")
        yield document


def _scored(*, paired: bool) -> list[Measure]:
    return [one for one in MEASURES.values() if one.paired == paired]


def _function(measure: Measure) -> Callable[[Tensor, Tensor], Tensor]:
    module, _, name = measure.function.partition(":")
    found: Callable[[Tensor, Tensor], Tensor] = getattr(import_module(module), name)
    return found


def _sum(measure: Measure, values_T: Tensor, document: Document, whose: str) -> float | int:
    score = float(values_T.sum())
    if not math.isfinite(score):
        raise StageError(
            f"{whose} gave logits on document {document['id']} that are no distribution",
            measured=score,
            limit="finite",
            remedy="Look for NaN or overflow in the step that made the model: judge its input checkpoint the same way.",
        )
    return int(score) if measure.count else score


def read_documents(data: bytes, ids_NT: Tensor, name: str, *, first: int, paired: bool) -> list[Document] | None:
    """Scores that were written as JSON, None unless they are those of exactly these documents.

    Args:
        data: what `json.dumps` made of a list of documents.
        ids_NT: the tokens that must have been scored.
        name: begins each document's id.
        first: number of the first document.
        paired: whether there is a baseline.
    """
    try:
        found = json.loads(data)
        documents = [_typed(one, paired) for one in found]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    ids = [_id(name, index, ids_T) for index, ids_T in enumerate(ids_NT, start=first)]
    tokens = ids_NT.shape[1] - 1
    same = ids == [document["id"] for document in documents] and all(one["tokens"] == tokens for one in documents)
    return documents if same and found == documents else None


def _typed(found: dict[str, Any], paired: bool) -> Document:
    # In this order: a report's bytes must not depend on where its documents were scored.
    document: Document = {"id": str(found["id"]), "tokens": int(found["tokens"])}
    for one in [*_scored(paired=False), *(_scored(paired=True) if paired else ())]:
        document[one.score] = int(found[one.score]) if one.count else _finite(found[one.score])
    return document


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise ValueError(score)
    return float(score)


def _id(name: str, index: int, ids_T: Tensor) -> str:
    return f"{name}-{index:05d}-{hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()[:12]}"


def summary(documents: Sequence[Document]) -> Metrics:
    """The token-weighted measures over all documents: those without a baseline, and where there is one the others.

    Raises:
        StageError: a measure is beyond float64.
    """
    tokens = [document["tokens"] for document in documents]
    measures: Metrics = {}
    for name, one in MEASURES.items():
        if not all(one.score in document for document in documents):
            continue
        sums = [document[one.score] for document in documents]
        measures[name] = perplexity(sums, tokens) if one.exponential else math.fsum(sums) / sum(tokens)
        if not math.isfinite(measures[name]):
            raise StageError(f"the {name} is beyond float64", measured=measures[name], limit="finite")
    return measures


def other_vocabulary(theirs: int, ours: int) -> StageError:
    """The refusal of a baseline whose tokens are not the model's."""
    return StageError(
        "the baseline has another vocabulary than the model, so their predictions cannot be compared",
        measured=f"{theirs} tokens",
        limit=f"the model's own {ours}",
        remedy="Name the checkpoint the model was made from as baseline, or judge without one.",
    )
