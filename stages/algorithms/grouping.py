"""Cut a chain of blocks into groups so that enough is saved and least is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.algorithms.allocation import Option, hull

Span = tuple[int, int]
Ways = Mapping[Span, Sequence[Sequence[Sequence[Option]]]]
"""Span (first block, first block after it) -> ways to treat it -> parts of a way -> options of a part."""
Chosen = list[tuple[Span, int]]
"""Spans in order, each with the index of its way."""

HALVINGS = 60


def grouped(chains: Sequence[tuple[int, Ways]], target: int) -> list[Chosen]:
    """The cut of every chain that saves at least `target` at the least price for damage that allows it.

    At a price per unit saved each chain is cut by dynamic programming, each part taking its best option or none; the
    price is found by halving.

    Args:
        chains: (length, ways); a span that no way covers cannot be a group, and every single block has a way.
        target: how much all must save together.

    Returns:
        A cut of each chain. Its parts' options can save `target`.

    Raises:
        ValueError: no price saves so much.

    Source: Everett, Generalized Lagrange multiplier method (1963); shortest path over a chain's cuts.
    """
    hulls = _hulls(chains)
    low, high = 0.0, _dear(hulls)
    best, saved = _at(hulls, high)
    if saved < target:
        raise ValueError(f"at most {saved} can be saved, {target} asked")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        cuts, saved = _at(hulls, middle)
        if saved < target:
            low = middle
        else:
            best, high = cuts, middle
    return best


def most(chains: Sequence[tuple[int, Ways]]) -> int:
    """What all chains can save at most."""
    hulls = _hulls(chains)
    return _at(hulls, _dear(hulls))[1]


def _hulls(chains: Sequence[tuple[int, Ways]]) -> list[tuple[int, Ways]]:
    # The best option at any price is a corner of the hull, which begins with leaving the part alone.
    return [
        (length, {span: [[hull(part) for part in way] for way in found] for span, found in ways.items()})
        for length, ways in chains
    ]


def _dear(hulls: Sequence[tuple[int, Ways]]) -> float:
    """A price at which one unit more is worth any damage."""
    options = [o for _, ways in hulls for found in ways.values() for way in found for part in way for o in part]
    return 1.0 + 2 * sum(option.damage for option in options)


def _at(chains: Sequence[tuple[int, Ways]], price: float) -> tuple[list[Chosen], int]:
    cuts, saved = [], 0
    for length, ways in chains:
        cut, more = _cut(length, ways, price)
        cuts.append(cut)
        saved += more
    return cuts, saved


def _cut(length: int, ways: Ways, price: float) -> tuple[Chosen, int]:
    # reached[j]: (cost, saved, cut) of the best cut of the first j blocks.
    reached: list[tuple[float, int, Chosen]] = [(0.0, 0, [])]
    for stop in range(1, length + 1):
        cuts = []
        for (start, end), several in ways.items():
            if end == stop:
                cost, saved, cut = reached[start]
                for index, way in enumerate(several):
                    taken = [min(part, key=lambda o: (o.damage - price * o.saved, -o.saved)) for part in way]
                    more = sum(one.saved for one in taken)
                    spent = sum(one.damage for one in taken) - price * more
                    cuts.append((cost + spent, saved + more, [*cut, ((start, stop), index)]))
        reached.append(min(cuts, key=lambda one: (one[0], -one[1])))
    return reached[-1][2], reached[-1][1]
