"""The map to compress when what it reads is no longer what the dense model reads.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.algorithms.products import product

DAMPING = 0.01
"""Share of the mean squared input added to every direction: directions that the text hardly shows stay as they were."""
PROBES = 128
"""Combinations of outputs on which the strength is judged."""
STRENGTH = 0.5
"""How far the target goes towards the least-squares solution where nothing says how far is right."""


def inverse_root(moment_II: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper and float32, with U^T U = (M + damping)^-1, the damping relative to the mean of M's diagonal.

    Its row j over its diagonal tells how what is lost in column j is best made up for by the columns after it; the
    diagonal's inverse squares, what a column then costs.

    Raises:
        ValueError: the moment is not finite.
    """
    if not moment_II.isfinite().all():
        raise ValueError("a moment of the inputs is not finite")
    # The root of the inverse is the inverse of a root: of M = R R^T with R upper, which is the factor of M read
    # backwards. One factorization in float64; R is as well-conditioned as float32 needs.
    moment = moment_II.flip(0, 1).to(torch.float64)
    moment.diagonal().add_(damping * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    upper_II = torch.linalg.cholesky(moment, out=moment).float().flip(0, 1)
    del moment  # twice as large as all else here
    return torch.linalg.solve_triangular(upper_II, torch.eye(len(upper_II)), upper=True)


def corrected(
    w_OI: Tensor,
    root_II: Tensor,
    drift_II: Tensor,
    residual_OI: Tensor | None = None,
    *,
    strength: float = STRENGTH,
) -> Tensor:
    """W + strength (W D + R) (M + damping)^-1: nearest to W x + r on the inputs z, where x, r are the dense model's.

    With strength 1 and no damping it is the least-squares solution of E||W x + r - (W* z + s)||^2, since
    E[(W x + r - s) z^T] = W (M + D) + R.

    Args:
        w_OI: the dense map.
        root_II: of the inverse of M = E[z z^T], the moment of the inputs that the compressed model gives; see
            `inverse_root`.
        drift_II: D = E[(x - z) z^T].
        residual_OI: R = E[(r - s) z^T] of what the map's output is added to; None where it is added to nothing.
        strength: 0 leaves W as it is.

    Returns:
        W*, float32.

    Raises:
        ValueError: a moment is not finite.

    Source: normal equations of least squares; GPTAQ (Li et al. 2025), equation 6, for D.
    """
    gap_OI = product(w_OI.float(), drift_II.float())
    if residual_OI is not None:
        gap_OI += residual_OI
    if not gap_OI.isfinite().all():
        raise ValueError("a moment of the inputs is not finite")
    return product(product(gap_OI, root_II.T), root_II).mul_(strength).add_(w_OI)


def agreement(
    w_OI: Tensor,
    moments: Sequence[Tensor],
    drifts: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    damping: float = DAMPING,
) -> float:
    """The strength that helps on the half of the text that a fit has not seen, 0 to 1; both halves take turns.

    A fit G = (W D + R) (M + damping)^-1 on one half changes the squared error on the other by
    s^2 tr(G M' G^T) - 2 s tr((W D' + R') G^T), which is least at the ratio of the two. Where rounding loses little the
    fit is mostly noise, and the ratio is near 0; where it loses much, near 1.

    Args:
        w_OI: the dense map.
        moments: M of each half; both scaled alike, so are the others.
        drifts: D of each half.
        residuals: R of each half, or None.
        damping: of the fit.
    """
    # Both are sums over outputs: of many, random combinations estimate them (Hutchinson) to a few hundredths.
    mix_PO = _signs(len(w_OI))
    w, gained, spent = product(mix_PO, w_OI.float()), 0.0, 0.0
    gaps = [
        product(w, d) if r is None else product(w, d) + product(mix_PO, r)
        for d, r in zip(drifts, residuals, strict=True)
    ]
    for fitted, judged in ((0, 1), (1, 0)):
        moment = moments[fitted].float().clone()
        moment.diagonal().add_(damping * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
        factor_II, failed = torch.linalg.cholesky_ex(moment)
        if failed:
            continue  # too ill-conditioned for float32: this half has no say
        step_OI = torch.cholesky_solve(gaps[fitted].T, factor_II).T
        gained += float((gaps[judged] * step_OI).sum())
        spent += float((product(step_OI, moments[judged].float()) * step_OI).sum())
    return min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0


def _signs(outputs: int) -> Tensor:
    if outputs <= PROBES:
        return torch.eye(outputs)
    return torch.randint(0, 2, (PROBES, outputs), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
