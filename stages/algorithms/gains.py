"""Gains of the norm before a head whose weights are not free, such as those of a tied embedding.

Shapes: V vocabulary, H hidden, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.algorithms.basis import damped


def fitted_gains(w_VH: Tensor, moment_KK: Tensor, cross_HK: Tensor, kept_K: Tensor) -> Tensor:
    """Factors f_K with the least E||W y - W_K (f * z)||^2, by least squares whose ridge draws them to 1; float64.

    With A = W^T W the normal equations are (A_KK * E[z z^T]) f = diag(A_KH E[y z^T]), products taken entry by entry.

    Args:
        w_VH: the head.
        moment_KK: E[z z^T] of what it reads now, times any number.
        cross_HK: E[y z^T], y what it read before, times the same number.
        kept_K: which of the H dimensions z has.
    """
    gram_KH = (w_VH[:, kept_K].T @ w_VH).double()
    system_KK = gram_KH[:, kept_K] * moment_KK
    left_K = (gram_KH * cross_HK.T).sum(1) - system_KK.sum(1)
    return 1 + torch.linalg.solve(damped(system_KK), left_K)
