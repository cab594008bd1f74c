"""Learning rates and batches as pure functions of the step, so that a resumed run goes on as if it never stopped."""

from __future__ import annotations

import math

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


def batch(step: int, size: int, count: int, seed: int) -> list[int]:
    """Which of `count` windows a step takes: each once an epoch, in an order drawn anew for every epoch."""
    positions = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in {position // count for position in positions}
    }
    return [int(orders[position // count][position % count]) for position in positions]
