"""Learning rates and batches as pure functions of the step, so that a resumed run goes on as if it never stopped."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak rate at a step: linear over `warmup` steps, then half a cosine down to a tenth.

    Args:
        step: 0 for the first.
        steps: of the whole run.
        warmup: steps until the peak.

    Returns:
        In (0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    along = (step - warmup) / max(1, steps - 1 - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, along)))


def batch(step: int, size: int, count: int, seed: int, written: int = 0) -> list[int]:
    """Which of `count` windows a step takes: each once an epoch, in an order drawn anew for every epoch.

    Args:
        step: 0 for the first.
        size: windows of a step.
        count: windows in all.
        seed: of every order.
        written: how many of them, the last, stand at every other place; the others stand between them.
    """
    groups = [(0, count - written), (count - written, written)] if written else [(0, count)]
    chosen = []
    for position in range(step * size, (step + 1) * size):
        first, among = groups[position % len(groups)]
        epoch, place = divmod(position // len(groups), among)
        chosen.append(first + _order(among, seed * 1_000_003 + epoch)[place])
    return chosen


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
