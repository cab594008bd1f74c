"""Rounding weights to signed integers with a scale, symmetric around zero, the scale found by search.

Shapes: O outputs, I inputs, G blocks along I, B block length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.algorithms.grids import Grid

RATIOS = (1.0, 7 / 8, *(1.06 - 0.04 * step for step in range(14)))
"""Scales tried, as shares of the plain maximum's: clipping the largest weights often lowers the error of the rest.

At 7/8 the largest weight of four bits, if negative, lands on -8.
"""

ROWS = 4096
"""Rows rounded at once: a table of tokens is as large as a small model's blocks."""


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
    q_OI, scale_O = torch.empty(w_OI.shape, dtype=torch.int8), torch.empty(len(w_OI))
    for part_OI, q, scale in zip(w_OI.split(ROWS), q_OI.split(ROWS), scale_O.split(ROWS), strict=True):
        _check_finite(part_OI)
        scale.copy_(_positive(part_OI.float().abs().amax(1) / top))
        q.copy_(torch.clamp(torch.round(part_OI / scale[:, None]), -top, top))
    return q_OI, scale_O


def search_scales(
    w_OGB: Tensor,
    grid: Grid,
    importance_GB: Tensor | None = None,
    *,
    ratios: tuple[float, ...] = RATIOS,
    plain: Callable[[Tensor], Tensor] | None = None,
    storable: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Tensor:
    """The scale of each block with the least weighted squared error of rounding to nearest.

    Args:
        w_OGB: blocks of weights, float32.
        grid: what is rounded to.
        importance_GB: weight of each input's squared error; None for equal.
        ratios: scales tried, as shares of the plain one; the first of equals is taken.
        plain: peak_OG -> scale_OG by the format's own rule; None for the one that reaches the peak.
        storable: the nearest scale that the format can store.

    Returns:
        scale_OG, strictly positive.
    """
    peak_OG = w_OGB.abs().amax(2)
    plain_OG = peak_OG / grid.top if plain is None else plain(peak_OG)
    best_OG = plain_OG
    least_OG: Tensor | None = None
    for ratio in ratios:
        tried_OG = _positive(storable(plain_OG * ratio))
        scale_OG1 = tried_OG[..., None]
        error_OGB = grid.nearest(w_OGB / scale_OG1).mul_(scale_OG1).sub_(w_OGB).square_()
        error_OG = error_OGB.sum(2) if importance_GB is None else (error_OGB * importance_GB).sum(2)
        better_OG = torch.ones_like(error_OG, dtype=torch.bool) if least_OG is None else error_OG < least_OG
        least_OG = error_OG if least_OG is None else torch.where(better_OG, error_OG, least_OG)
        best_OG = torch.where(better_OG, tried_OG, best_OG)
    return best_OG


def fake_round(x: Tensor, scale: Tensor | float, bits: int = 8) -> Tensor:
    """Round to the nearest multiple of `scale`, half to even, saturating at both ends, as QuantizeLinear does."""
    top = _top(bits)
    return torch.clamp(torch.round(x / scale), -top - 1, top) * scale


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
