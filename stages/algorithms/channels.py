"""Which inputs of a linear map can go with the least output error, and the weights that mend what remains.

Shapes: F channels (the map's inputs), O outputs, K kept channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.algorithms.basis import damped

ROUNDS = 8
"""Channels go in at most so many rounds; after each the others' importance is exact again. One a round gains nothing
that could be measured on trained models and costs F^2 for every channel."""


def least_important(w_OF: Tensor, moment_FF: Tensor, count: int, *, rounds: int = ROUNDS) -> Tensor:
    """Indices of `count` channels whose removal costs least once the others make up for it, in order of removal.

    A channel's cost is ||w_j||^2 / (M^-1)_jj, the exact rise of E||W a||^2 error when it alone goes and the rest is
    fitted again.

    Args:
        w_OF: the map that reads the channels.
        moment_FF: E[a a^T] of the channels.
        count: how many go, fewer than F.
        rounds: in how many rounds; `count` for the exact greedy order.

    Raises:
        ValueError: count is not below F, or the moment is not finite.

    Source: Hassibi and Stork, Optimal Brain Surgeon (1993), for columns; Kurtic et al., ZipLM (2023), section 3.1.
    """
    channels = w_OF.shape[1]
    if not 0 <= count < channels:
        raise ValueError(f"{count} of {channels} channels cannot go")
    if not moment_FF.isfinite().all():
        raise ValueError("the channels' moment is not finite")
    w, inverse = w_OF.double().clone(), torch.linalg.inv(damped(moment_FF))
    removed: list[int] = []
    at_once = -(-count // rounds) if count else 1
    while len(removed) < count:
        cost_F = w.square().sum(0) / inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
        cost_F[removed] = torch.inf
        now = cost_F.argsort(stable=True)[: min(at_once, count - len(removed))]
        step_kF = torch.linalg.solve(inverse[now][:, now], inverse[now])
        w -= w[:, now] @ step_kF
        inverse -= inverse[:, now] @ step_kF
        removed += now.tolist()
    return torch.tensor(removed, dtype=torch.int64)


def reconstructed(w_OF: Tensor, moment_FF: Tensor, kept_K: Tensor) -> Tensor:
    """w_OK with the least E||W a - W' a_K||^2, by ridge least squares; float64.

    Args:
        w_OF: the map before.
        moment_FF: E[a a^T] of all channels.
        kept_K: indices of the channels that stay.
    """
    moment = damped(moment_FF)
    return torch.linalg.solve(moment[kept_K][:, kept_K], moment[kept_K] @ w_OF.double().T).T


def output_error(w_OF: Tensor, moment_FF: Tensor, kept_K: Tensor, w_OK: Tensor) -> float:
    """E||W a - W' a_K||^2 / E||W a||^2."""
    w, moment = w_OF.double(), moment_FF.double()
    difference = w.clone()
    difference[:, kept_K] -= w_OK.double()
    return float(((difference @ moment) * difference).sum() / ((w @ moment) * w).sum())
