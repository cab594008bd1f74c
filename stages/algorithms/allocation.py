"""Choose one option for each part so that enough is saved and least is lost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to treat a part: what it saves and what it costs; `rank` is the caller's label."""

    saved: int
    damage: float
    rank: int


NOTHING = Option(0, 0.0, 0)


def allocate(parts: Sequence[Sequence[Option]], target: int) -> list[Option]:
    """The options of least total damage that save at least `target`.

    Follows each part's lower convex hull in order of damage for what is saved; the part that crosses the target then
    takes its least damaging option that is enough. No choice that saves as much as the hull's does less damage.

    Args:
        parts: the options of each part; leaving it as it is counts as one more.
        target: how much must be saved.

    Returns:
        One option for each part, `NOTHING` where it is left alone.

    Raises:
        ValueError: even all parts together cannot save so much.

    Source: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), section 11.2, the multiple-choice greedy.
    """
    best = sum(max((option.saved for option in options), default=0) for options in parts)
    if best < target:
        raise ValueError(f"at most {best} can be saved, {target} asked")
    hulls = [hull(options) for options in parts]
    chosen = [NOTHING] * len(parts)
    heap = [(_slope(h[0], h[1]), index, 1) for index, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(heap)
    saved = 0
    while saved < target:
        _, index, step = heapq.heappop(heap)
        before, after = chosen[index], hulls[index][step]
        others = saved - before.saved
        saved = others + after.saved
        chosen[index] = after
        if saved >= target:
            enough = [option for option in parts[index] if others + option.saved >= target]
            chosen[index] = min(enough, key=lambda option: (option.damage, -option.saved))
        elif step + 1 < len(hulls[index]):
            heapq.heappush(heap, (_slope(after, hulls[index][step + 1]), index, step + 1))
    return chosen


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of damage over savings, from `NOTHING` on, in order of savings."""
    corners = [NOTHING]
    for option in sorted((o for o in options if o.saved > 0), key=lambda o: (o.saved, o.damage)):
        if option.saved == corners[-1].saved:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], option):
            corners.pop()
        corners.append(option)
    return corners


def _slope(a: Option, b: Option) -> float:
    return (b.damage - a.damage) / (b.saved - a.saved)
