"""Scores of a model's predictions, one document after another.

Shapes: N documents of one window each, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.measures.divergence import kl_divergence, top1_agreement
from stages.measures.perplexity import negative_log_likelihood, perplexity
from stages.runtime.contract import Metrics, StageError

Predict = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [1, T] -> logits [1, T, V]."""


class Document(TypedDict):
    """Sums over a document's predicted tokens; `kl` and `agree` where there is a baseline."""

    id: str
    tokens: int
    nll: float
    kl: NotRequired[float]
    agree: NotRequired[int]


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
    for index, ids_T in enumerate(ids_NT, start=first):
        window = ids_T[None].numpy()
        # The last row predicts a token that nobody knows.
        logits_TV = torch.from_numpy(model(window)[0, :-1])
        nll_T = negative_log_likelihood(logits_TV, ids_T[1:])
        document: Document = {
            "id": _id(name, index, ids_T),
            "tokens": len(nll_T),
            "nll": float(nll_T.sum()),
        }
        _check_finite(document["nll"], document, "the model")
        if baseline is not None:
            baseline_TV = torch.from_numpy(baseline(window)[0, :-1])
            if baseline_TV.shape != logits_TV.shape:
                raise other_vocabulary(baseline_TV.shape[-1], logits_TV.shape[-1])
            document["kl"] = float(kl_divergence(baseline_TV, logits_TV).sum())
            document["agree"] = int(top1_agreement(baseline_TV, logits_TV).sum())
            _check_finite(document["kl"], document, "the model or its baseline")
        yield document


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
    document: Document = {"id": str(found["id"]), "tokens": int(found["tokens"]), "nll": _finite(found["nll"])}
    if paired:
        document["kl"], document["agree"] = _finite(found["kl"]), int(found["agree"])
    return document


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise ValueError(score)
    return float(score)


def _id(name: str, index: int, ids_T: Tensor) -> str:
    return f"{name}-{index:05d}-{hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()[:12]}"


def summary(documents: Sequence[Document]) -> Metrics:
    """The token-weighted measures over all documents: perplexity and, with a baseline, kl_divergence, top1_agreement.

    Raises:
        StageError: the perplexity is beyond float64.
    """
    tokens = [document["tokens"] for document in documents]
    measures = {"perplexity": perplexity([document["nll"] for document in documents], tokens)}
    if not math.isfinite(measures["perplexity"]):
        raise StageError("the perplexity is beyond float64", measured=measures["perplexity"], limit="finite")
    if all("kl" in document for document in documents):
        measures["kl_divergence"] = math.fsum(document["kl"] for document in documents) / sum(tokens)
        measures["top1_agreement"] = sum(document["agree"] for document in documents) / sum(tokens)
    return measures


def other_vocabulary(theirs: int, ours: int) -> StageError:
    """The refusal of a baseline whose tokens are not the model's."""
    return StageError(
        "the baseline has another vocabulary than the model, so their predictions cannot be compared",
        measured=f"{theirs} tokens",
        limit=f"the model's own {ours}",
        remedy="Name the checkpoint the model was made from as baseline, or judge without one.",
    )


def _check_finite(score: float, document: Document, whose: str) -> None:
    if not math.isfinite(score):
        raise StageError(
            f"{whose} gave logits on document {document['id']} that are no distribution",
            measured=score,
            limit="finite",
            remedy="Look for NaN or overflow in the step that made the model: judge its input checkpoint the same way.",
        )
