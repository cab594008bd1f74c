"""Scores of a model's predictions, one document after another.

Shapes: N documents of one window each, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NotRequired, TypedDict

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


def score_documents(ids_NT: Tensor, model: Predict, baseline: Predict | None, name: str) -> Iterator[Document]:
    """Score windows of tokens: the logits of one window at a time, of the model and of the baseline, and no more.

    Args:
        ids_NT: int64 tokens, one document a row.
        model: the judged model.
        baseline: what it is compared with.
        name: begins each document's id. The id ends in a digest of the tokens, so that scores of other text or of
            another tokenizer can never be paired with these.

    Raises:
        StageError: logits that are no distribution, or a baseline with another vocabulary.
    """
    for index, ids_T in enumerate(ids_NT):
        digest = hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()
        window = ids_T[None].numpy()
        # The last row predicts a token that nobody knows.
        logits_TV = torch.from_numpy(model(window)[0, :-1])
        nll_T = negative_log_likelihood(logits_TV, ids_T[1:])
        document: Document = {
            "id": f"{name}-{index:05d}-{digest[:12]}",
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
