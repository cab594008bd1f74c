"""One map for several blocks: what it is, and what each block's own difference needs on top.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.algorithms.basis import damped


def common(weights: Sequence[Tensor], moments: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    """w_OI with the least sum over blocks b of E||(W_b - w) x_b||^2, each weighted by its mean importance; float64.

    Args:
        weights: w_OI of each block.
        moments: E[x x^T] of each block's inputs.
        importance: weight of each output's squared error, [O], for each block.

    Raises:
        ValueError: a value is not finite.

    Source: Bae et al., Relaxed Recursive Transformers (ICLR 2025), section 2.3, average initialization; weighted by
    activations it is the normal equations' solution.
    """
    if not all(one.isfinite().all() for one in (*weights, *moments, *importance)):
        raise ValueError("a weight, an importance or an input moment is not finite")
    shares = [float(one.mean()) for one in importance]
    scaled = [share * moment.double() for share, moment in zip(shares, moments, strict=True)]
    product_OI = torch.stack([w.double() @ moment for w, moment in zip(weights, scaled, strict=True)]).sum(0)
    total_II = torch.stack(scaled).sum(0)
    # Along directions that no input has, the plain mean is as good as anything.
    extra = damped(total_II) - total_II
    mean_OI = torch.stack([w.double() for w in weights]).mean(0)
    return torch.linalg.solve(total_II + extra, (product_OI + mean_OI @ extra).T).T
