"""Several fine-tuned weights into one: averaging, interpolation on a sphere, and arithmetic of what each changed.

Shapes: N elements of a tensor or of a piece of one; every list has one entry a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def soup(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean.

    Args:
        models: w_N each, float.
        weights: not negative, of a positive sum; they are divided by it.

    Returns:
        w_N, float32 at least.

    Raises:
        ValueError: the weights do not fit.

    Source: Wortsman et al. 2022, Model soups, section 2.
    """
    shares = normalized(weights, len(models))
    return torch.stack([share * one.float() for share, one in zip(shares, models, strict=True)]).sum(0)


def normalized(weights: Sequence[float], count: int) -> list[float]:
    """The weights with sum 1.

    Raises:
        ValueError: there are not `count` of them, one is negative or not finite, or all are zero.
    """
    total = math.fsum(weights)
    if len(weights) != count or not all(math.isfinite(one) and one >= 0 for one in weights) or not total > 0:
        raise ValueError(f"{count} weights are needed, none negative and not all zero, given {list(weights)}")
    return [one / total for one in weights]


def slerp(a_N: Tensor, b_N: Tensor, t: float) -> Tensor:
    """The point at `t` on the arc from a to b; see `arc`."""
    a, b = a_N.double(), b_N.double()
    one, other = arc(float(a @ b), float(a @ a), float(b @ b), t)
    return (one * a + other * b).float()


def arc(product: float, square_a: float, square_b: float, t: float) -> tuple[float, float]:
    """Factors of a and b of the point at `t` on the arc from a to b.

    Args:
        product: a . b
        square_a: a . a
        square_b: b . b
        t: 0 gives a, 1 gives b.

    Returns:
        sin((1-t) W) / sin(W) and sin(t W) / sin(W) for the angle W between them; 1-t and t where a and b lie on one
        line, which has no arc.

    Source: Shoemake 1985, Animating rotation with quaternion curves, section 3.3.
    """
    length = math.sqrt(square_a) * math.sqrt(square_b)
    angle = math.acos(max(-1.0, min(1.0, product / length))) if length > 0 else 0.0
    if math.sin(angle) < 1e-6:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def threshold(parts: Callable[[], Iterable[Tensor]], keep: float) -> float:
    """The magnitude that the largest share `keep` of all values reaches, exactly, and in constant memory.

    Non-negative floats are ordered as their bits are, so that two passes count first the upper half of the bits, then
    the lower half of those that share the upper half in question.

    Args:
        parts: gives the values of all tensors, finite, float32; called twice.
        keep: over 0, at most 1.

    Raises:
        ValueError: `keep` is out of its range, or there are no values.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is over 0 and at most 1, given {keep}")
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for part_N in parts():
        upper += torch.bincount(_bits(part_N) >> 16, minlength=len(upper))
    left = round(keep * int(upper.sum())) or 1
    high, left = _counted_down(upper, left)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for part_N in parts():
        bits_N = _bits(part_N)
        lower += torch.bincount(bits_N[bits_N >> 16 == high] & 0xFFFF, minlength=len(lower))
    low, _ = _counted_down(lower, left)
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))


def _bits(part_N: Tensor) -> Tensor:
    return part_N.flatten().float().abs().view(torch.int32)


def _counted_down(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th largest value lies, and which of that bin's values it is."""
    if int(counts.sum()) < wanted:
        raise ValueError("there are no values")
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, wanted))
    found = len(counts) - 1 - place
    return found, wanted - int(reached[place] - counts[found])


def trim(change_N: Tensor, least: float) -> Tensor:
    """The changes of at least this magnitude; the others are zero.

    Source: Yadav et al. 2023, TIES-Merging, section 4, step 1; `threshold` gives `least` for a whole model.
    """
    return torch.where(change_N.abs() >= least, change_N, torch.zeros_like(change_N))


def dare(change_N: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Each change with probability `keep`, divided by it, else zero: the expectation is the change itself.

    Raises:
        ValueError: `keep` is not over 0 and at most 1.

    Source: Yu et al. 2023, Language models are super Mario, section 3.2.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is over 0 and at most 1, given {keep}")
    kept_N = torch.rand(change_N.shape, generator=generator) < keep
    return torch.where(kept_N, change_N / keep, torch.zeros_like(change_N))


def elected(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of each element the sign that weighs more, and the weighted mean of the changes that have it.

    Zeros take no part. Where both signs weigh the same the result is zero.

    Args:
        changes: trimmed, w_N each.
        weights: as for `soup`.

    Raises:
        ValueError: the weights do not fit.

    Source: Yadav et al. 2023, TIES-Merging, section 4, steps 2 and 3.
    """
    shares = torch.tensor(normalized(weights, len(changes)), dtype=torch.float32)
    changes_MN = torch.stack([one.float() for one in changes])
    sign_N = torch.einsum("m,m...->...", shares, changes_MN).sign()
    agrees_MN = (changes_MN.sign() == sign_N) & (sign_N != 0)
    weight_MN = agrees_MN * shares.view(-1, *[1] * sign_N.dim())
    total_N = weight_MN.sum(0)
    return (weight_MN * changes_MN).sum(0) / torch.where(total_N > 0, total_N, torch.ones_like(total_N))


def conflicts(changes: Sequence[Tensor]) -> Tensor:
    """Where some changes are positive and others negative: bool, [N]."""
    signs_MN = torch.stack([one.sign() for one in changes])
    return (signs_MN.amax(0) > 0) & (signs_MN.amin(0) < 0)
