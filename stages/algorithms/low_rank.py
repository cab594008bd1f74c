"""A linear map as a product of two thin ones, cut where its outputs lose least.

Shapes: O outputs, I inputs, R the smaller of both, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.algorithms.basis import damped


@dataclass(frozen=True)
class Factors:
    """A map's singular system in the metric of its inputs and outputs.

    Attributes:
        energy_R: squared singular values, descending, float64. What lies beyond a rank is what truncation loses.
        left_OR: float64; the first r columns and rows of both factors make the best map of rank r.
        right_RI: float64.
    """

    energy_R: Tensor
    left_OR: Tensor
    right_RI: Tensor


def factors(w_OI: Tensor, moment_II: Tensor, importance_O: Tensor | None = None) -> Factors:
    """The singular system of diag(importance)^(1/2) W S, where S S^T is the inputs' moment.

    It is found on the smaller side: with fewer outputs than inputs, S itself is never needed.

    Args:
        w_OI: the map.
        moment_II: E[x x^T] of its inputs.
        importance_O: weight of an output's squared error; ones if absent.

    Returns:
        The system, from which any rank can be cut.

    Raises:
        ValueError: a value is not finite.

    Source: Wang et al., SVD-LLM (ICLR 2025), section 3.2; the outputs' weights are the diagonal of the Fisher
    information (Hsu et al., FWSVD, 2022).
    """
    w, scale_O, moment = _scaled(w_OI, moment_II, importance_O)
    if len(w) <= w.shape[1]:
        values_R, left_OR = torch.linalg.eigh(w @ moment @ w.T)
        left_OR = left_OR.flip(1)
        right_RI = left_OR.T @ w
    else:
        root_II = torch.linalg.cholesky(moment)
        values_R, vectors_IR = torch.linalg.eigh(root_II.T @ (w.T @ w) @ root_II)
        vectors_IR = vectors_IR.flip(1)
        right_RI = torch.linalg.solve_triangular(root_II, vectors_IR.T, upper=False, left=False)
        left_OR = w @ (root_II @ vectors_IR)
    return Factors(values_R.flip(0).clamp_min(0), left_OR / scale_O[:, None], right_RI)


def lost(w_OI: Tensor, moment_II: Tensor, importance_O: Tensor | None = None) -> Tensor:
    """Weighted squared output error of the best map at each rank 0..R, [R + 1]; arguments as of `factors`.

    Without the vectors it takes a third of the time.
    """
    w, _, moment = _scaled(w_OI, moment_II, importance_O)
    if len(w) <= w.shape[1]:
        core = w @ moment @ w.T
    else:
        root_II = torch.linalg.cholesky(moment)
        core = root_II.T @ (w.T @ w) @ root_II
    energy_R = torch.linalg.eigvalsh(core).clamp_min(0)
    return torch.cat([energy_R.new_zeros(1), energy_R.cumsum(0)]).flip(0)


def _scaled(w_OI: Tensor, moment_II: Tensor, importance_O: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight_O = torch.ones(len(w_OI)) if importance_O is None else importance_O
    if not (w_OI.isfinite().all() and moment_II.isfinite().all() and weight_O.isfinite().all()):
        raise ValueError("a weight, an importance or an input moment is not finite")
    # An output that no loss depends on would leave its row undetermined.
    scale_O = weight_O.double().clamp_min(1e-12 * float(weight_O.max()) + torch.finfo(torch.float64).tiny).sqrt()
    return w_OI.double() * scale_O[:, None], scale_O, damped(moment_II)


def cut(system: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """left_Or and right_rI of a rank; the rows of the right one are orthonormal.

    Rounding to few bits then costs every direction between them alike.

    Raises:
        ValueError: the rank is not between 1 and R.
    """
    most = system.energy_R.numel()
    if not 1 <= rank <= most:
        raise ValueError(f"rank {rank} is not between 1 and {most}")
    q_Ir, triangle_rr = torch.linalg.qr(system.right_RI[:rank].T)
    return system.left_OR[:, :rank] @ triangle_rr.T, q_Ir.T
