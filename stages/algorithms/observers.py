"""How far a static INT8 range reaches, by the rules of the field: largest value, percentile, squared error, entropy.

Shapes: N rows of activations, I inputs, K bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

LEVELS = 128
"""Magnitudes of a signed INT8 value."""
BINS = 2048
PERCENTILE = 0.9999
SHARES = tuple(step / 100 for step in range(100, 4, -1))


def largest(size_NI: Tensor, weight_N: Tensor) -> float:
    """The largest magnitude."""
    return float(size_NI.max())


def percentile(size_NI: Tensor, weight_N: Tensor, share: float = PERCENTILE) -> float:
    """The magnitude that a share of all values does not exceed."""
    values, order = size_NI.flatten().sort()
    mass = weight_N[:, None].expand_as(size_NI).flatten()[order].double().cumsum(0)
    return float(values[int(torch.searchsorted(mass, share * float(mass[-1])).clamp(max=len(values) - 1))])


def squared_error(size_NI: Tensor, weight_N: Tensor) -> float:
    """The range whose rounding and cutting together have the least squared error, to a hundredth of the largest."""
    top = float(size_NI.max())

    def lost(share: float) -> float:
        step = share * top / (LEVELS - 1)
        rounded_NI = (size_NI / step).round().clamp(max=LEVELS - 1) * step
        return float(((rounded_NI - size_NI).square().mean(1) * weight_N).sum())

    return top * min(SHARES, key=lost) if top else 0.0


def entropy(size_NI: Tensor, weight_N: Tensor) -> float:
    """The range whose values, rounded, keep most of the histogram's information.

    Of every range the histogram is cut there, what lies beyond joins the last bin, and its KL divergence to the same
    histogram in 128 levels is taken; levels spread evenly over the bins that are not empty.

    Source: Migacz 2017, 8-bit inference with TensorRT.
    """
    top = float(size_NI.max())
    if not top:
        return 0.0
    place = (size_NI * (BINS / top)).long().clamp(max=BINS - 1).flatten()
    mass_K = torch.zeros(BINS, dtype=torch.float64)
    mass_K.index_add_(0, place, weight_N[:, None].expand_as(size_NI).flatten().double())
    # Zeros are exact in any range and would outweigh everything else.
    mass_K[0] = mass_K[1]
    return top * min(range(LEVELS, BINS + 1, 8), key=lambda bins: _divergence(mass_K, bins)) / BINS


def _divergence(mass_K: Tensor, bins: int) -> float:
    inside = mass_K[:bins]
    reference = inside.clone()
    reference[-1] += mass_K[bins:].sum()
    level = (torch.arange(bins) * LEVELS).div(bins, rounding_mode="floor")
    used = (reference > 0).double()
    sums, counts = (torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, of) for of in (inside, used))
    spread = (sums / counts.clamp_min(1))[level] * used
    p, q = reference / reference.sum(), spread / spread.sum().clamp_min(1e-300)
    some = p > 0
    return float((p[some] * (p[some] / q[some].clamp_min(1e-12)).log()).sum()) if float(q.sum()) else math.inf


OBSERVERS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "minmax": largest,
    "percentile": percentile,
    "mse": squared_error,
    "entropy": entropy,
}
"""Name -> (magnitudes_NI, how many tokens each row stands for) -> the magnitude that the range reaches."""
