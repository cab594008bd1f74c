from itertools import pairwise, product

import numpy as np
import pytest

from stages.algorithms.allocation import NOTHING, Option
from stages.algorithms.grouping import grouped, most


def ways(draw, length, most):
    """Random convex options for every span of at most `most` blocks, two ways for single blocks."""
    found = {}
    for start in range(length):
        for stop in range(start + 1, min(length, start + most) + 1):
            found[start, stop] = [
                [curve(draw, stop - start) for _ in range(parts)] for parts in ((1, 2) if stop == start + 1 else (1,))
            ]
    return found


def curve(draw, size):
    damages = np.sort(draw.uniform(0, 1, 4)) * np.arange(1, 5) * size
    return [Option(10 * size * (step + 1), float(damage), step + 1) for step, damage in enumerate(damages)]


def cuts(length, most):
    if length == 0:
        return [[]]
    return [
        [*before, (length - size, length)]
        for size in range(1, min(most, length) + 1)
        for before in cuts(length - size, most)
    ]


def everything(found, length, most):
    """(saved, damage) of every cut, way and option."""
    made = []
    for cut in cuts(length, most):
        for chosen in product(*(range(len(found[span])) for span in cut)):
            parts = [part for span, way in zip(cut, chosen, strict=True) for part in found[span][way]]
            for options in product(*([NOTHING, *part] for part in parts)):
                made.append((sum(o.saved for o in options), sum(o.damage for o in options)))
    return made


def best_of(found, cut, target):
    parts = [part for span, way in cut for part in found[span][way]]
    all_ = [(sum(o.saved for o in c), sum(o.damage for o in c)) for c in product(*([NOTHING, *p] for p in parts))]
    return min((damage for saved, damage in all_ if saved >= target), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_grouped_saves_enough_and_no_brute_force_at_its_saving_is_better(seed):
    draw = np.random.default_rng(seed)
    found = ways(draw, 3, 2)
    target = int(draw.integers(10, 100))
    (cut,) = grouped([(3, found)], target)
    assert [stop for (_, stop), _ in cut][-1] == 3
    assert all(a[0][1] == b[0][0] for a, b in pairwise(cut))
    ours = best_of(found, cut, target)
    assert ours is not None
    # A price can only reach the corners of the trade-off: between two of them it may take the further one.
    corners = [d for s, d in everything(found, 3, 2) if s >= target + 40]
    assert ours <= min(corners, default=np.inf) + 1e-9
    assert ours >= min(d for s, d in everything(found, 3, 2) if s >= target) - 1e-9


def test_grouped_takes_a_group_where_it_is_worth_it():
    found = {
        (0, 1): [[[Option(10, 5.0, 1)]]],
        (1, 2): [[[Option(10, 5.0, 1)]]],
        (0, 2): [[[Option(20, 1.0, 1)]]],
    }
    assert grouped([(2, found)], 15) == [[((0, 2), 0)]]
    found[0, 2] = [[[Option(20, 11.0, 1)]]]
    assert grouped([(2, found)], 15) == [[((0, 1), 0), ((1, 2), 0)]]


def test_grouped_pays_no_more_than_the_target_asks_for():
    # A group could save more than both blocks alone, at a price that only a higher target is worth.
    found = {(0, 1): [[[Option(10, 1.0, 1)]]], (1, 2): [[[Option(10, 1.0, 1)]]], (0, 2): [[[Option(30, 20.0, 1)]]]}
    assert grouped([(2, found)], 15) == [[((0, 1), 0), ((1, 2), 0)]]
    assert grouped([(2, found)], 25) == [[((0, 2), 0)]]
    assert most([(2, found)]) == 30


def test_grouped_that_cannot_save_so_much_says_the_most():
    with pytest.raises(ValueError, match="at most 10 can be saved, 11 asked"):
        grouped([(1, {(0, 1): [[[Option(10, 1.0, 1)]]]})], 11)
