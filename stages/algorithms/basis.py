"""One low-rank basis for several linear maps of like inputs, cut where the outputs lose least.

Shapes: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-4
"""Share of the mean squared input that is added to every input direction, so that none has no energy at all."""


@dataclass(frozen=True)
class Whitened:
    """The stacked maps' singular system in the metric of their inputs.

    Attributes:
        energy_I: squared singular values, descending, float64. What lies beyond a rank is what truncation loses.
        reduce_II: rows span the bases: the first r rows are the best basis of rank r. float32, to halve what is held.
    """

    energy_I: Tensor
    reduce_II: Tensor


def whitened(weights: Sequence[Tensor], moment_II: Tensor, importance: Sequence[Tensor] | None = None) -> Whitened:
    """Singular values of the stacked diag(importance)^(1/2) W S, where S S^T is the inputs' moment, by Cholesky.

    Args:
        weights: w_OI of each map.
        moment_II: E[x x^T] of the inputs, pooled over the maps' blocks.
        importance: for each map the weight of an output's squared error, [O]; ones if absent.

    Returns:
        The singular system, from which any rank can be cut.

    Raises:
        ValueError: shapes disagree or a value is not finite.

    Source: Wang et al., Basis Sharing (ICLR 2025), section 3; the outputs' weights are the diagonal of the Fisher
    information (Martens and Grosse, K-FAC, 2015).
    """
    root_II, core_II = _core(weights, moment_II, importance)
    values_I, vectors_II = torch.linalg.eigh(core_II)
    reduce_II = torch.linalg.solve_triangular(root_II, vectors_II.T.flip(0), upper=False, left=False)
    return Whitened(values_I.flip(0).clamp_min(0), reduce_II.float())


def lost(weights: Sequence[Tensor], moment_II: Tensor, importance: Sequence[Tensor] | None = None) -> Tensor:
    """Weighted squared output error of the best basis at each rank 0..I, [I + 1]; arguments as of `whitened`.

    Without the vectors it takes a third of the time.
    """
    energy_I = torch.linalg.eigvalsh(_core(weights, moment_II, importance)[1]).clamp_min(0)
    return torch.cat([energy_I.new_zeros(1), energy_I.cumsum(0)]).flip(0)


def _core(weights: Sequence[Tensor], moment_II: Tensor, importance: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    inputs = moment_II.shape[0]
    if any(w_OI.shape[1] != inputs for w_OI in weights):
        raise ValueError(f"a map does not take {inputs} inputs")
    gram_II = torch.zeros(inputs, inputs, dtype=torch.float64)
    for index, w_OI in enumerate(weights):
        w = w_OI.double()
        gram_II += w.T @ (w if importance is None else w * importance[index].double()[:, None])
    if not (gram_II.isfinite().all() and moment_II.isfinite().all()):
        raise ValueError("a weight, an importance or an input moment is not finite")
    root_II = torch.linalg.cholesky(damped(moment_II))
    # The Gram matrix is far smaller than the stack; the digits it loses are those of values too small to matter.
    return root_II, root_II.T @ gram_II @ root_II


def damped(moment_II: Tensor, share: float = DAMPING) -> Tensor:
    """The moment in float64 with `share` of its mean diagonal added to the diagonal."""
    moment = moment_II.to(torch.float64, copy=True)
    moment.diagonal().add_(share * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    return moment


def cut(system: Whitened, rank: int) -> Tensor:
    """basis_rI of a rank, with orthonormal rows: rounding to few bits then costs every direction alike.

    Raises:
        ValueError: the rank is not between 1 and I.
    """
    inputs = system.energy_I.numel()
    if not 1 <= rank <= inputs:
        raise ValueError(f"rank {rank} is not between 1 and {inputs}")
    q_Ir, _ = torch.linalg.qr(system.reduce_II[:rank].double().T)
    return q_Ir.T


def fitted(w_OI: Tensor, basis_rI: Tensor, moment_II: Tensor) -> Tensor:
    """coefficient_Or with the least E||W x - C B x||^2 under the map's own inputs.

    Args:
        w_OI: the map.
        basis_rI: the group's basis.
        moment_II: E[x x^T] of this map's inputs.

    Returns:
        C = W M B^T (B M B^T)^-1 in float64.
    """
    moment = damped(moment_II)
    basis = basis_rI.double()
    cross_Ir = moment @ basis.T
    return torch.linalg.solve(basis @ cross_Ir, cross_Ir.T @ w_OI.double().T).T
