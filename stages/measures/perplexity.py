"""Perplexity of predicted tokens, from logits.

Shapes: T predicted tokens, R rows of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

ROWS = 64
"""Rows in work at a time: 13 MB for a vocabulary of 49,152, where a whole window of 512 would take 100 MB each time."""


def shifted(rows_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A stable softmax in parts: logits less their maximum, the exponentials of that, the logarithm of their sum.

    The sum is taken in float64, so that of float32 only each exponential's own rounding is left, which the sum averages
    away; exponentials in float64 take three times as long.

    Returns:
        x_RV, e_RV (both like rows_RV) and lse_R (float64).
    """
    x_RV = rows_RV - rows_RV.amax(-1, keepdim=True)
    e_RV = x_RV.exp()
    return x_RV, e_RV, e_RV.sum(-1, dtype=torch.float64).log()


def negative_log_likelihood(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """How surprising each token was, in nats.

    Args:
        logits_TV: float, row t predicts targets_T[t].
        targets_T: int64, the tokens that came.

    Returns:
        nll_T (float64); NaN or infinite where the logits are.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if logits_TV.ndim != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_TV.shape)} do not predict targets {tuple(targets_T.shape)}")
    parts = [torch.empty(0, dtype=torch.float64)]
    for rows, wanted in zip(logits_TV.split(ROWS), targets_T.split(ROWS), strict=True):
        x_RV, _, lse_R = shifted(rows)
        parts.append(lse_R - x_RV.gather(-1, wanted[:, None]).squeeze(-1))
    return torch.cat(parts)


def masked_negative_log_likelihood(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """How surprising each hidden token was to a model that read all others, in nats.

    Its mean's exponential is no probability of the text (Salazar et al. 2020), so that it has a name of its own.
    """
    return negative_log_likelihood(logits_RV, targets_R)


def perplexity(nll: Iterable[float], tokens: Iterable[int]) -> float:
    """Exponential of the token-weighted mean negative log-likelihood.

    Args:
        nll: sums in nats, one a document.
        tokens: predicted tokens, one count a document.

    Returns:
        1 for perfect prediction, V for uniform guessing; infinity where float64 ends.

    Raises:
        ValueError: no token was predicted.
    """
    count = sum(tokens)
    if count < 1:
        raise ValueError("perplexity needs at least one predicted token")
    try:
        return math.exp(math.fsum(nll) / count)
    except OverflowError:
        return math.inf
