"""Which inputs of a linear map can go with the least output error, and the weights that mend what remains.

Shapes: F channels (the map's inputs), O outputs, K kept channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stages.algorithms.basis import damped
from stages.algorithms.worst_source import Sources

ROUNDS = 8
"""Channels go in at most so many rounds; after each the others' importance is exact again. One a round gains nothing
that could be measured on trained models and costs F^2 for every channel."""
FLOOR = 1.0
"""Share of the channels' median energy that caution adds to each one's, see `removals`."""


def least_important(
    w_OF: Tensor,
    moment_FF: Tensor,
    count: int,
    *,
    size: int = 1,
    rounds: int = ROUNDS,
    floor: float = 0.0,
    sources: Sequence[Tensor] = (),
) -> Tensor:
    """Indices of `count` channels whose removal costs least once the others make up for it, in order of removal.

    The cost of neighbours that go together is tr(W_g [(M^-1)_gg]^-1 W_g^T), the exact rise of E||W a||^2 error when
    they alone go and the rest is fitted again; for a single channel it is ||w_j||^2 / (M^-1)_jj.

    Args:
        w_OF: the map that reads the channels.
        moment_FF: E[a a^T] of the channels.
        count: how many go, fewer than F.
        size: channels that go together, such as those of a group of heads; divides F and `count`.
        rounds: in how many rounds; as many as groups go for the exact greedy order.
        floor: see `removals`.
        sources: see `removals`.

    Raises:
        ValueError: count is not below F, or the moment is not finite.

    Source: Hassibi and Stork, Optimal Brain Surgeon (1993), for columns; Kurtic et al., ZipLM (2023), section 3.1.
    """
    how = removals(w_OF, moment_FF, count, size=size, rounds=rounds, floor=floor, sources=sources)
    rounds_of = [gone for gone, _ in how]
    return rounds_of[-1] if rounds_of else torch.empty(0, dtype=torch.int64)


def removals(
    w_OF: Tensor,
    moment_FF: Tensor,
    count: int,
    *,
    size: int = 1,
    rounds: int = ROUNDS,
    floor: float = 0.0,
    sources: Sequence[Tensor] = (),
) -> Iterator[tuple[Tensor, float]]:
    """What goes, round by round: all that is gone so far, and the error E||W a - W' a_K||^2 with the rest fitted.

    A channel that the text never wakes costs nothing by the moment, and is the first to go; but channels wake rarely
    that hold single facts, and a text of ten thousand tokens reaches few of them. A floor counts every channel as if it
    carried, besides what it was seen to carry and apart from all others, that share of the channels' median energy.

    Args:
        w_OF, moment_FF, count, size, rounds: those of `least_important`, whose errors are these, too.
        floor: share of the median of the moment's diagonal that is added to the diagonal. The error told includes it.
        sources: E[a a^T] of each source of the text, weighed as its error shall count. Of several, a channel costs what
            it costs the source that it costs most, and the error told is that of the source that is hurt most. Each
            takes as much memory as the moment and its inverse.
    """
    channels = w_OF.shape[1]
    if not 0 <= count < channels or count % size or channels % size:
        raise ValueError(f"{count} of {channels} channels cannot go in groups of {size}")
    if not moment_FF.isfinite().all():
        raise ValueError("the channels' moment is not finite")
    if not count:
        return
    moment = damped(moment_FF)
    moment.diagonal().add_(floor * moment_FF.diagonal().double().median())
    w, inverse = w_OF.double().clone(), torch.linalg.inv(moment)
    worst = None
    if len(sources) > 1:
        worst = Sources(w, inverse, sources, moment.diagonal() - moment_FF.diagonal().double())
    del moment  # as large as the inverse
    groups = torch.arange(channels).view(-1, size)
    left, removed, error = list(range(len(groups))), list[int](), 0.0
    at_once = -(-count // size // rounds)
    while len(removed) * size < count:
        cost = _costs(w, inverse, groups[left], worst)
        cheapest = cost.argsort(stable=True)[: min(at_once, count // size - len(removed))].tolist()
        chosen = [left[place] for place in cheapest]
        now = groups[chosen].flatten()
        corner_kk = inverse[now][:, now]
        # Of all that go in a round together the exact rise, as `_costs` has it of each alone.
        error += float((torch.linalg.solve(corner_kk, w[:, now].T) * w[:, now].T).sum())
        step_kF = torch.linalg.solve(corner_kk, inverse[now])
        if worst is not None:
            worst.leave(now, torch.linalg.solve(corner_kk, w[:, now].T), step_kF)
            error = float(worst.errors.max())
        # In place: of wide maps the inverse is the most that a pass holds.
        w.addmm_(w[:, now], step_kF, alpha=-1)
        inverse.addmm_(inverse[:, now], step_kF, alpha=-1)
        removed += chosen
        left = [one for one in left if one not in set(chosen)]
        yield groups[removed].flatten().to(torch.int64), error


def alike(w_OF: Tensor, moment_FF: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """Moments of sources, each scaled so that the map's output has the energy of the whole text's in every one."""
    whole, *each = (float(((w_OF.double() @ one.double()) * w_OF).sum()) for one in (moment_FF, *sources))
    return [one * (whole / energy if energy else 1.0) for one, energy in zip(sources, each, strict=True)]


def _costs(w_OF: Tensor, inverse_FF: Tensor, groups_gs: Tensor, worst: Sources | None) -> Tensor:
    if groups_gs.shape[1] == 1:
        one_g = groups_gs[:, 0]
        tiny = torch.finfo(torch.float64).tiny
        if worst is not None:
            turned_gO = w_OF.T[one_g] / inverse_FF.diagonal()[one_g].clamp_min(tiny)[:, None]
            return worst.costs(turned_gO[:, None], groups_gs)
        return w_OF.square().sum(0)[one_g] / inverse_FF.diagonal()[one_g].clamp_min(tiny)
    corners_gss = inverse_FF[groups_gs[:, :, None], groups_gs[:, None, :]]
    w_gsO = w_OF.T[groups_gs]
    # Corners are positive definite; torch's LU of several matrices at once fails with some numbers of threads.
    turned_gsO = torch.cholesky_solve(w_gsO, torch.linalg.cholesky(corners_gss))
    return (turned_gsO * w_gsO).sum((1, 2)) if worst is None else worst.costs(turned_gsO, groups_gs)


def reconstructed(w_OF: Tensor, moment_FF: Tensor, kept_K: Tensor) -> Tensor:
    """w_OK with the least E||W a - W' a_K||^2, by ridge least squares; float64.

    Args:
        w_OF: the map before.
        moment_FF: E[a a^T] of all channels.
        kept_K: indices of the channels that stay.
    """
    rows_KF = damped(moment_FF)[kept_K]
    wanted_KO = rows_KF @ w_OF.double().T
    corner_KK = rows_KF[:, kept_K]
    del rows_KF
    return torch.linalg.solve(corner_KK, wanted_KO).T


def output_error(w_OF: Tensor, moment_FF: Tensor, kept_K: Tensor, w_OK: Tensor) -> float:
    """E||W a - W' a_K||^2 / E||W a||^2."""
    w, moment = w_OF.double(), moment_FF.double()
    difference = w.clone()
    difference[:, kept_K] -= w_OK.double()
    return float(((difference @ moment) * difference).sum() / ((w @ moment) * w).sum())
