"""Least squares for the weights that stay, rows at once.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    left_OI = ((target_OI - w) @ moment_II) * mask
    scaled_OI = left_OI / diagonal_I
    along_OI = scaled_OI
    size_O1 = (left_OI * scaled_OI).sum(1, keepdim=True)
    for _ in range(steps):
        image_OI = (along_OI @ moment_II) * mask
        step_O1 = size_O1 / (along_OI * image_OI).sum(1, keepdim=True).clamp_min(tiny)
        w = w + step_O1 * along_OI
        left_OI = left_OI - step_O1 * image_OI
        scaled_OI = left_OI / diagonal_I
        next_O1 = (left_OI * scaled_OI).sum(1, keepdim=True)
        along_OI = scaled_OI + next_O1 / size_O1.clamp_min(tiny) * along_OI
        size_O1 = next_O1
    return w


def output_error(target_OI: Tensor, new_OI: Tensor, moment_II: Tensor) -> float:
    """E||(target - new) x||^2 / E||target x||^2."""
    target, moment = target_OI.float(), moment_II.float()
    difference = target - new_OI.float()
    errors = [((one @ moment) * one).sum(dtype=torch.float64) for one in (difference, target)]
    return float(errors[0] / errors[1])
