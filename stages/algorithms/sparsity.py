"""Which weights stay: N of every M neighbours or the largest of all, and the mask as bits.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.algorithms.allocation import Option

Keep = Callable[[Tensor], Tensor]
"""Scores of neighbouring columns, [O, B] -> mask, true where a weight stays."""


SPARSE = 0.02
"""A matrix with at least this share of zeros is sparse; a dense one has a zero by chance."""
_PATTERNS = ((2, 4), (4, 8))
_ROWS, _COLUMNS = 64, 64


def is_sparse(weight: Tensor) -> bool:
    """Whether it is a matrix with so many zeros that they were put there, and not rounded to on a grid of few values.

    A checkpoint that was in four bits once has zeros where weights were small, and beside them as few values as its
    grid; what pruning left differs from weight to weight, or has one pattern throughout.
    """
    if weight.dim() != 2 or float((weight == 0).float().mean()) < SPARSE:
        return False
    return not _on_grid(weight) or any(_patterned(weight, *pattern) for pattern in _PATTERNS)


def _patterned(w_OI: Tensor, kept: int, group: int) -> bool:
    """Whether no group of neighbours has more than so many that stand: by chance no matrix is so throughout."""
    if w_OI.shape[1] % group:
        return False
    return not bool(((w_OI != 0).unflatten(1, (-1, group)).sum(2) > kept).any())


def _on_grid(w_OI: Tensor) -> bool:
    near_RC = w_OI[:_ROWS, :_COLUMNS].abs().float().sort(dim=1).values
    stands = int((near_RC > 0).sum())
    distinct = int(((near_RC[:, 1:] > near_RC[:, :-1]) & (near_RC[:, 1:] > 0)).sum() + (near_RC[:, 0] > 0).sum())
    return distinct < stands / 2


def of_each(kept: int, group: int) -> Keep:
    """The `kept` largest of every `group` neighbours in a row: an N:M pattern such as 2:4.

    Raises:
        ValueError: kept is not below group, or, when called, the group does not divide the columns.
    """
    if not 0 < kept < group:
        raise ValueError(f"{kept} of every {group} is no pattern")

    def keep(score_OB: Tensor) -> Tensor:
        if score_OB.shape[1] % group:
            raise ValueError(f"groups of {group} do not divide {score_OB.shape[1]} inputs")
        score = score_OB.unflatten(1, (-1, group))
        best = score.topk(kept, dim=2).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(2, best, True).flatten(1)

    return keep


def largest(share: float) -> Keep:
    """The largest `share` of all scores at hand, rounded down.

    Raises:
        ValueError: the share is outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} is outside 0..1")

    def keep(score_OB: Tensor) -> Tensor:
        best = score_OB.flatten().topk(int(share * score_OB.numel())).indices
        return (
            torch.zeros(score_OB.numel(), dtype=torch.bool, device=score_OB.device)
            .scatter_(0, best, True)
            .view_as(score_OB)
        )

    return keep


def by_rows(keeps: Sequence[Keep], sizes: Sequence[int]) -> Keep:
    """Several maps below each other: each one's rows by its own rule."""
    return lambda score_OB: torch.cat(
        [keep(part) for keep, part in zip(keeps, score_OB.split(list(sizes)), strict=True)]
    )


def wanda(w_OI: Tensor, moment_II: Tensor) -> Tensor:
    """score_OI: the square of |weight| times its input's norm, the rise of the output's error when it alone goes.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models (2023), equation 1.
    """
    return w_OI.square() * moment_II.diagonal()


def prices(w_OI: Tensor, moment_II: Tensor, importance_O: Tensor, shares: Sequence[float]) -> tuple[Option, ...]:
    """What each share of kept weights saves and loses when nothing is mended; `rank` is the share's place.

    Args:
        w_OI: the map.
        moment_II: E[x x^T] of its inputs.
        importance_O: weight of an output's squared error, e.g. the mean squared gradient there.
        shares: shares of kept weights, of which the largest scores stay.
    """
    loss = (wanda(w_OI, moment_II) * importance_O[:, None]).flatten().double().sort().values.cumsum(0) / 2
    gone = [loss.numel() - int(share * loss.numel()) for share in shares]
    return tuple(Option(count, float(loss[count - 1]), place) for place, count in enumerate(gone) if count)


def packed(mask_OI: Tensor) -> Tensor:
    """The mask as bits, [O, ceil(I / 8)] uint8, the first column in the lowest bit."""
    outputs, inputs = mask_OI.shape
    padded = torch.zeros(outputs, -(-inputs // 8) * 8, dtype=torch.uint8, device=mask_OI.device)
    padded[:, :inputs] = mask_OI
    return (padded.unflatten(1, (-1, 8)) * (1 << _places(mask_OI))).sum(2, dtype=torch.uint8)


def unpacked(bits: Tensor, inputs: int) -> Tensor:
    """mask_OI from `packed`."""
    return (bits[..., None] >> _places(bits) & 1).bool().flatten(1)[:, :inputs]


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
