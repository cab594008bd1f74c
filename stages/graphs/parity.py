"""Whether two executions of one model agree, by their logits on real text.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.runtime.contract import StageError

LOGIT_LIMIT = 1e-3
"""Largest logit difference over the logits' standard deviation. Both sides compute in fp32, without rounding."""

CROSS_ENTROPY_LIMIT = 1e-3
"""Nats a token."""


@dataclass(frozen=True)
class Parity:
    """How far `found` is from `reference`.

    Attributes:
        logit_difference: largest difference of a logit over the standard deviation of the reference's logits; where
            there are a few for each window, over the root of their mean square.
        cross_entropy_difference: difference of the mean negative log-likelihoods, in nats a token; 0 where no token is
            predicted.
    """

    logit_difference: float
    cross_entropy_difference: float


def parity(ids_NT: NDArray[np.int64] | None, reference: NDArray[np.float32], found: NDArray[np.float32]) -> Parity:
    """Compare two executions on the same windows.

    Args:
        ids_NT: the windows, where the next token is predicted; None for any other answer.
        reference: [N, T, V], or any shape that begins with N.
        found: of the same shape.
    """
    spread = reference.std() if reference.ndim > 2 else np.sqrt(np.square(reference).mean())
    difference = float(np.abs(reference - found).max() / spread)
    if ids_NT is None:
        return Parity(difference, 0.0)
    return Parity(difference, abs(_cross_entropy(ids_NT, found) - _cross_entropy(ids_NT, reference)))


def divergence(reference_NTV: NDArray[np.float32], found_NTV: NDArray[np.float32]) -> float:
    """Mean KL(reference || found) of what each token is followed by, in nats."""
    (log_p, log_q) = (_log_softmax(one.astype(np.float64)) for one in (reference_NTV, found_NTV))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def require_parity(differences: Parity, what: str) -> None:
    """Raise unless two executions agree.

    Args:
        found: from `parity`.
        what: the sentence's subject: what should agree with what.

    Raises:
        StageError: a difference is beyond its limit, or a logit is not finite.
    """
    # Written so that a NaN fails.
    if not differences.logit_difference <= LOGIT_LIMIT:
        raise StageError(
            f"{what} differ in their logits",
            measured=f"{differences.logit_difference:.3g} standard deviations",
            limit=LOGIT_LIMIT,
            remedy="Report it with the checkpoint's config.json: the graph does not compute this model.",
        )
    if not differences.cross_entropy_difference <= CROSS_ENTROPY_LIMIT:
        raise StageError(
            f"{what} differ in cross-entropy",
            measured=f"{differences.cross_entropy_difference:.3g} nats a token",
            limit=CROSS_ENTROPY_LIMIT,
            remedy="Report it with the checkpoint's config.json: the graph does not compute this model.",
        )


def halves(ids_NT: NDArray[np.int64]) -> NDArray[np.int64]:
    """type_NT by which a model that tells segments apart is compared: each window's second half is the second one."""
    seconds_T = np.arange(ids_NT.shape[1]) >= ids_NT.shape[1] // 2
    return np.tile(seconds_T.astype(np.int64), (len(ids_NT), 1))


def prose_ids(encode: Callable[[str], list[int]], windows: int, tokens: int) -> NDArray[np.int64]:
    """ids_NT of English reference prose that every Python carries, for artifacts that come without a text.

    Args:
        encode: the model's tokenizer.
        windows: N.
        tokens: T.
    """
    from pydoc_data.topics import topics  # 465 kB that only this function reads

    ids: list[int] = []
    for name in sorted(topics):
        ids += encode(topics[name])
        if len(ids) >= windows * tokens:
            break
    return np.array(ids[: windows * tokens], dtype=np.int64).reshape(windows, tokens)


def _cross_entropy(ids_NT: NDArray[np.int64], logits_NTV: NDArray[np.float32]) -> float:
    total = 0.0
    for ids_T, logits_TV in zip(ids_NT, logits_NTV, strict=True):
        shifted = logits_TV[:-1] - logits_TV[:-1].max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(shifted, ids_T[1:, None], axis=-1)[:, 0]
        total += float((np.log(np.exp(shifted).sum(axis=-1)) - chosen).astype(np.float64).sum())
    return total / (ids_NT.shape[0] * (ids_NT.shape[1] - 1))
