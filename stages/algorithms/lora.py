"""Low-rank updates: a frozen matrix learns by the product of two thin ones, which is added to it at the end.

Shapes: O rows, I columns, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The update of one matrix, up_Or @ down_rI."""

    up_Or: Tensor
    down_rI: Tensor


def begun(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Factors whose product is zero: the first step moves `up` alone.

    Args:
        shape: O and I of the matrix.
        rank: r, at most the smaller of both.
        generator: of `down`, whose entries have variance 1 / r.

    Raises:
        ValueError: the rank is not in 1..min(O, I).

    Source: Hu et al. 2021, LoRA, section 4.1.
    """
    outputs, inputs = shape
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank {rank} must lie in 1..{min(shape)} for a matrix of {outputs} x {inputs}")
    return Factors(torch.zeros(outputs, rank), torch.randn(rank, inputs, generator=generator) / rank**0.5)


def merged(w_OI: Tensor, factors: Factors) -> Tensor:
    """The matrix with its update: w + up @ down."""
    return torch.addmm(w_OI, factors.up_Or, factors.down_rI)


def slopes(g_OI: Tensor, factors: Factors) -> Factors:
    """Gradients of both factors from the gradient of the merged matrix."""
    return Factors(g_OI @ factors.down_rI.t(), factors.up_Or.t() @ g_OI)
