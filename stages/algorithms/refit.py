"""Least squares for the weights that stay, rows at once.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.algorithms.products import SHORT, product

STEPS = 8
"""Steps of conjugate gradients: from SparseGPT's weights, eight take nearly all that the exact solution would."""


def refit(w_OI: Tensor, target_OI: Tensor, moment_II: Tensor, mask_OI: Tensor, steps: int = STEPS) -> Tensor:
    """Weights under a mask that come closer to E||(target - w) x||^2 = 0, by preconditioned conjugate gradients.

    Each row is a system of its own; all share the products with the moment. No step raises a row's error.

    Args:
        w_OI: where to start; zero outside the mask.
        target_OI: what the map would be without a mask.
        moment_II: E[x x^T] of its inputs, damped as one wishes; positive definite.
        mask_OI: true where a weight stays.
        steps: at most so many.

    Returns:
        w_OI, zero outside the mask.

    Source: Hestenes and Stiefel, Methods of Conjugate Gradients (1952); Jacobi's preconditioner.
    """
    w, mask, diagonal_I = w_OI * mask_OI, mask_OI.to(w_OI.dtype), moment_II.diagonal()
    tiny = torch.finfo(w.dtype).tiny
    left_OI = product(target_OI - w, moment_II).mul_(mask)
    along_OI = left_OI / diagonal_I
    size_O1 = _products(left_OI, along_OI)
    for _ in range(steps):
        image_OI = product(along_OI, moment_II).mul_(mask)
        step_O1 = size_O1 / _products(along_OI, image_OI).clamp_min(tiny)
        w.addcmul_(step_O1, along_OI)
        left_OI.addcmul_(step_O1, image_OI, value=-1)
        scaled_OI = torch.div(left_OI, diagonal_I, out=image_OI)
        next_O1 = _products(left_OI, scaled_OI)
        along_OI.mul_(next_O1 / size_O1.clamp_min(tiny)).add_(scaled_OI)
        size_O1 = next_O1
    return w


def _products(a_OI: Tensor, b_OI: Tensor) -> Tensor:
    """Of each row of one with that of the other, [O, 1]."""
    return torch.linalg.vecdot(a_OI, b_OI)[:, None]


def output_errors(target_OI: Tensor, made: Sequence[Tensor], moment_II: Tensor) -> list[float]:
    """E||(target - new) x||^2 / E||target x||^2 of each new map, to three digits."""
    short_II = moment_II.to(SHORT)  # averages over many products: a few digits are exact, in a third of the time
    size = _quadratic(target_OI, short_II) or torch.finfo(torch.float32).tiny
    return [_quadratic(target_OI - new_OI, short_II) / size for new_OI in made]


def _quadratic(w_OI: Tensor, short_II: Tensor) -> float:
    return float((product(w_OI.to(SHORT), short_II).float() * w_OI).sum())
