"""How much a block changes what passes through it."""

from __future__ import annotations

import torch
from torch import Tensor


def influence(x_TH: Tensor, y_TH: Tensor) -> float:
    """Mean over tokens of 1 - cos(input, output): 0 for a block that only scales.

    Raises:
        ValueError: a vector is zero or not finite.

    Source: Men et al., ShortGPT (2024), equation 1.
    """
    x, y = x_TH.double(), y_TH.double()
    norms_T = x.norm(dim=-1) * y.norm(dim=-1)
    if not (norms_T.isfinite() & (norms_T > 0)).all():
        raise ValueError("a hidden vector is zero or not finite")
    return float(1 - torch.mean((x * y).sum(-1) / norms_T))
