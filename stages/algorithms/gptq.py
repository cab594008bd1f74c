"""Round a map column by column, each column's error made up for by those that follow.

Shapes: O outputs, I inputs, B block length, G blocks along I.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.algorithms.products import product

COLUMNS = 64
"""Columns whose errors are gathered before the rest of the matrix is touched, where scales stand for whole rows."""

Rounder = Callable[[Tensor], Tensor]
"""w at scale 1 -> nearest values of the grid."""
Scales = Callable[[Tensor, Tensor], Tensor]
"""(w_OB, importance_B) -> scale_O of a block."""


def gptq(
    w_OI: Tensor,
    root_II: Tensor,
    nearest: Rounder,
    scales: Scales,
    block: int | None,
    stands_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round so that E||(W - Q) x||^2 is small: errors of a column go, weighted, into the columns after it.

    A block's scales are chosen when it is reached, from the weights as they are then, each column's error weighted by
    what it costs after the others have made up for it.

    Args:
        w_OI: weights, float.
        root_II: upper, of the inverse of E[x x^T] of what the map reads; see `correction.inverse_root`.
        nearest: rounds at scale 1.
        scales: chooses the scales of a block.
        block: B, inputs that share a scale; None for one scale a row.
        stands_OI: false where a weight is zero and stays so; None where none has to.

    Returns:
        v_OI, values at scale 1 (float32), and scale_OG (float32); G is 1 without blocks.

    Raises:
        ValueError: B does not divide I, or a weight or the root is not finite.

    Source: Frantar et al. 2022, GPTQ, algorithm 1; scales by block as reached: section 4, "additional tricks".
    """
    inputs = w_OI.shape[1]
    size = block or inputs
    if inputs % size:
        raise ValueError(f"{inputs} inputs cannot be cut into blocks of {size}")
    if not (w_OI.isfinite().all() and root_II.isfinite().all()):
        raise ValueError("the weights or their inputs' moment hold a NaN or an infinity")
    # Transposed, a column is contiguous memory.
    w_IO = w_OI.t().float().contiguous()
    v_IO, diagonal_I = torch.empty_like(w_IO), root_II.diagonal()
    importance_I = diagonal_I.pow(-2)
    stands_IO = None if stands_OI is None else stands_OI.t().to(w_IO.dtype).contiguous()
    found = []
    for start in range(0, inputs, size):
        stop = start + size
        here_BO = w_IO[start:stop] if stands_IO is None else w_IO[start:stop] * stands_IO[start:stop]
        scale_O = scales(here_BO.t(), importance_I[start:stop])
        found.append(scale_O)
        for first in range(start, stop, COLUMNS):
            columns = range(first, min(first + COLUMNS, stop))
            _columns(w_IO, v_IO, root_II, columns, scale_O, _masked(nearest, stands_IO))
    return v_IO.t().contiguous(), torch.stack(found, dim=1)


def _masked(nearest: Rounder, stands_IO: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    return lambda w_O, index: nearest(w_O) if stands_IO is None else nearest(w_O) * stands_IO[index]


def _columns(
    w_IO: Tensor,
    v_IO: Tensor,
    root_II: Tensor,
    columns: range,
    scale_O: Tensor,
    nearest: Callable[[Tensor, int], Tensor],
) -> None:
    start, stop = columns.start, columns.stop
    error_BO = torch.empty(len(columns), w_IO.shape[1])
    for index in columns:
        # What the columns before it left is taken up here, at once: it reads half of what handing it on would write.
        w_O = torch.addmv(w_IO[index], error_BO[: index - start].t(), root_II[start:index, index], alpha=-1)
        v_IO[index] = nearest(w_O / scale_O, index)
        torch.addcmul(w_O, v_IO[index], scale_O, value=-1, out=error_BO[index - start]).div_(root_II[index, index])
    w_IO[stop:] -= product(root_II[start:stop, stop:].t(), error_BO)
