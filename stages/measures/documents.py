"""Scores of a model's predictions, one document after another.

Shapes: N documents of one window each, T tokens, R scored rows, V vocabulary or what else a row is over.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from stages.measures.item_scores import columns, function_of
from stages.measures.perplexity import perplexity
from stages.measures.predictions import Answer, Asking
from stages.measures.table import BROUGHT, MEASURES, Measure, measure_of, measured
from stages.runtime.contract import Metrics, StageError

Document = dict[str, Any]
"""`id`, `tokens` (the scored rows), and sums over these, each under its measure's key; some need a baseline."""


def score_documents(
    ids_NT: Tensor, model: Answer, baseline: Answer | None, asking: Asking, name: str, *, first: int = 0
) -> Iterator[Document]:
    """Score windows of tokens: what one window at a time is answered, by the model and the baseline, and no more.

    Args:
        ids_NT: int64 tokens, one document a row.
        model: the judged model.
        baseline: what it is compared with.
        asking: how both are asked.
        name: begins each document's id. The id ends in a digest of the tokens, so that scores of other text or of
            another tokenizer can never be paired with these.
        first: number of the first document, where these are a part of more.

    Raises:
        StageError: logits that are no distribution, or a baseline with another vocabulary.
    """
    alone, pairs = measured(asking.task, paired=False), measured(asking.task, paired=True)
    for index, ids_T in enumerate(ids_NT, start=first):
        rows_RV, target_R = asking.predicted(model, ids_T)
        document: Document = {"id": _id(name, index, ids_T), "tokens": len(rows_RV)}
        for one in alone.values():
            document[one.score] = _sum(one, _function(one)(rows_RV, target_R), document, "the model")
        if baseline is not None:
            baseline_RV, _ = asking.predicted(baseline, ids_T)
            if baseline_RV.shape != rows_RV.shape:
                raise other_vocabulary(baseline_RV.shape[-1], rows_RV.shape[-1])
            for one in pairs.values():
                values_R = _function(one, several=asking.several)(baseline_RV, rows_RV)
                document[one.score] = _sum(one, values_R, document, "the model or its baseline")
        yield document


def _function(measure: Measure, *, several: bool = False) -> Callable[[Tensor, Tensor | None], Tensor]:
    module, _, name = ((several and measure.of_labels) or measure.function).partition(":")
    found: Callable[[Tensor, Tensor | None], Tensor] = getattr(import_module(module), name)
    return found


def _sum(measure: Measure, values_R: Tensor, document: Document, whose: str) -> float | int:
    score = float(values_R.sum())
    if not math.isfinite(score):
        raise StageError(
            f"{whose} gave logits on document {document['id']} that are no distribution",
            measured=score,
            limit="finite",
            remedy="Look for NaN or overflow in the step that made the model: judge its input checkpoint the same way.",
        )
    return int(score) if measure.count else score


def read_documents(
    data: bytes, ids_NT: Tensor, asking: Asking, name: str, *, first: int, paired: bool
) -> list[Document] | None:
    """Scores that were written as JSON, None unless they are those of exactly these documents.

    Args:
        data: what `json.dumps` made of a list of documents.
        ids_NT: the tokens that must have been scored.
        asking: how the model was asked.
        name: begins each document's id.
        first: number of the first document.
        paired: whether there is a baseline.
    """
    try:
        found = json.loads(data)
        documents = [_typed(one, asking.task, paired) for one in found]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    ids = [_id(name, index, ids_T) for index, ids_T in enumerate(ids_NT, start=first)]
    rows = asking.rows(ids_NT.shape[1])
    same = ids == [document["id"] for document in documents] and all(one["tokens"] == rows for one in documents)
    return documents if same and found == documents else None


def _typed(found: dict[str, Any], task: str, paired: bool) -> Document:
    # In this order: a report's bytes must not depend on where its documents were scored.
    document: Document = {"id": str(found["id"]), "tokens": int(found["tokens"])}
    for one in (*measured(task, paired=False).values(), *(measured(task, paired=True).values() if paired else ())):
        document[one.score] = int(found[one.score]) if one.count else _finite(found[one.score])
    return document


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise ValueError(score)
    return float(score)


def _id(name: str, index: int, ids_T: Tensor) -> str:
    return f"{name}-{index:05d}-{hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()[:12]}"


def summary(documents: Sequence[Document]) -> Metrics:
    """The measures over all documents: those without a baseline, and where there is one the others.

    Those of predictions are weighted by tokens, those of items count each item once.

    Raises:
        StageError: a measure is beyond float64.
    """
    tokens = [document["tokens"] for document in documents]
    measures: Metrics = {}
    own = [key for key in (documents[0] if documents else ()) if key.startswith(BROUGHT)]
    for name, one in ((name, measure_of(name)) for name in (*MEASURES, *own)):
        if one.between or not all(one.score in document for document in documents):
            continue
        if one.of_items:
            value = float(function_of(one)(columns(documents), np.ones((1, len(documents))))[0])
            # A NaN says that there is nothing to measure it by.
            measures |= {} if math.isnan(value) else {name: value}
            continue
        sums = [document[one.score] for document in documents]
        measures[name] = perplexity(sums, tokens) if one.exponential else math.fsum(sums) / sum(tokens)
        if not math.isfinite(measures[name]):
            raise StageError(f"the {name} is beyond float64", measured=measures[name], limit="finite")
    return measures


def sliced(documents: Sequence[Document], names: Sequence[str]) -> list[Document]:
    """The documents, each with the name of the slice that it belongs to; where that is empty, it is left out."""
    return [one | ({"slice": name} if name else {}) for one, name in zip(documents, names, strict=True)]


def by_slice(documents: Sequence[Document]) -> dict[str, dict[str, Metrics]]:
    """{"slices": name -> its own measures}; nothing where no document belongs to one."""
    names = sorted({one["slice"] for one in documents if "slice" in one})
    own = {name: summary([one for one in documents if one.get("slice") == name]) for name in names}
    return {"slices": own} if own else {}


def other_vocabulary(theirs: int, ours: int) -> StageError:
    """The refusal of a baseline whose tokens are not the model's."""
    return StageError(
        "the baseline has another vocabulary than the model, so their predictions cannot be compared",
        measured=f"{theirs} tokens",
        limit=f"the model's own {ours}",
        remedy="Name the checkpoint the model was made from as baseline, or judge without one.",
    )
