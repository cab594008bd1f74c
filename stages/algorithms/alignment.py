"""Assign each of few things to one of many so that the order stays.

Shapes: S things to assign, B to choose from.
"""

from __future__ import annotations

import torch
from torch import Tensor


def increasing(cost_SB: Tensor) -> list[int]:
    """The strictly increasing choice of columns, one a row, with the least sum of costs.

    Args:
        cost_SB: finite, S at most B.

    Returns:
        S columns; of equal sums, that with the smaller last columns.

    Raises:
        ValueError: there are fewer columns than rows.

    Source: dynamic programming over prefixes; Needleman and Wunsch 1970 with gaps on one side alone, at no cost.
    """
    rows, columns = cost_SB.shape
    if rows > columns:
        raise ValueError(f"{rows} things cannot keep their order among {columns}")
    best_B = torch.zeros(columns + 1, dtype=torch.float64)  # of the rows so far within the first n columns
    taken = []
    for cost_B in cost_SB:
        ending_B = best_B[:-1] + cost_B
        best_B = torch.cat([torch.full((1,), torch.inf), ending_B.cummin(0).values])
        taken.append(ending_B)
    chosen, stop = [], columns
    for ending_B in reversed(taken):
        stop = int(ending_B[:stop].argmin())
        chosen.append(stop)
    return chosen[::-1]
