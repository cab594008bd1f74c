"""Rounding weights to signed integers with a scale, symmetric around zero, the scale found by search.

Shapes: O outputs, I inputs, G blocks along I, B block length.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATIOS = (1.0, 7 / 8, *(1.08 - 0.02 * step for step in range(30)))
"""Scales tried, as shares of the plain maximum's: clipping the largest weights often lowers the error of the rest.

At 7/8 the largest weight of four bits, if negative, lands on -8.
"""


def round_rows(w_OI: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round each row to signed integers so that q_OI * scale_O[:, None] is close to w_OI.

    Args:
        w_OI: weights, float, shape [O, I].
        bits: integer width, 2 to 8.

    Returns:
        q_OI (int8, [O, I]) and scale_O (float32, [O], strictly positive).

    Raises:
        ValueError: w_OI holds a NaN or an infinity, or bits is out of range.
    """
    top = _top(bits)
    _check_finite(w_OI)
    scale_O = _positive(w_OI.float().abs().amax(1) / top)
    q_OI = torch.clamp(torch.round(w_OI / scale_O[:, None]), -top, top)
    return q_OI.to(torch.int8), scale_O


def round_blocks(
    w_OI: Tensor, bits: int, block: int, importance_I: Tensor | None = None, ratios: tuple[float, ...] = RATIOS
) -> tuple[Tensor, Tensor]:
    """Round blocks of inputs to signed integers, the scale of each block searched for the least weighted error.

    Args:
        w_OI: weights, float, shape [O, I].
        bits: integer width, 2 to 8.
        block: B, weights of a row that share a scale; divides I.
        importance_I: weight of each input's squared error, e.g. the mean square of what it reads; None for equal.
        ratios: scales tried, as shares of the one that reaches the largest weight.

    Returns:
        q_OI (int8, [O, I]) and scale_OG (float32, [O, I/B], strictly positive).

    Raises:
        ValueError: a NaN or an infinity, bits out of range, or B does not divide I.
    """
    top = _top(bits)
    _check_finite(w_OI)
    if w_OI.shape[1] % block:
        raise ValueError(f"{w_OI.shape[1]} inputs cannot be cut into blocks of {block}")
    w_OGB = w_OI.float().unflatten(1, (-1, block))
    weight_GB = None if importance_I is None else importance_I.float().view(-1, block)
    peak_OG = w_OGB.abs().amax(2)
    best_OG = torch.full_like(peak_OG, torch.inf)
    scale_OG = _positive(peak_OG / top)
    for ratio in ratios:
        tried_OG = _positive(peak_OG * (ratio / top))
        error_OGB = (_rounded(w_OGB, tried_OG, top) * tried_OG[..., None] - w_OGB).square()
        error_OG = error_OGB.sum(2) if weight_GB is None else (error_OGB * weight_GB).sum(2)
        better = error_OG < best_OG
        best_OG = torch.where(better, error_OG, best_OG)
        scale_OG = torch.where(better, tried_OG, scale_OG)
    return _rounded(w_OGB, scale_OG, top).to(torch.int8).flatten(1), scale_OG


def fake_round(x: Tensor, scale: Tensor | float, bits: int = 8) -> Tensor:
    """Round to the nearest multiple of `scale`, half to even, saturating at both ends, as QuantizeLinear does."""
    top = _top(bits)
    return torch.clamp(torch.round(x / scale), -top - 1, top) * scale


def _rounded(w_OGB: Tensor, scale_OG: Tensor, top: int) -> Tensor:
    return torch.clamp(torch.round(w_OGB / scale_OG[..., None]), -top - 1, top)


def _positive(scale: Tensor) -> Tensor:
    # A block of zeros gets scale 1: zero is exact with any, and engines refuse a scale of zero.
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _check_finite(w_OI: Tensor) -> None:
    if not torch.isfinite(w_OI).all():
        raise ValueError("the weights hold a NaN or an infinity")


def _top(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"cannot round to {bits} bits: 2 to 8 are possible")
    return int(2 ** (bits - 1) - 1)
