from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.algorithms.allocation import NOTHING, Option, allocate, hull

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40), st.floats(0.01, 9, allow_nan=False), st.integers(1, 9)), max_size=5
)


def brute_force(parts, target):
    """Least damage over every combination that saves enough."""
    totals = (
        (sum(o.saved for o in choice), sum(o.damage for o in choice))
        for choice in product(*([NOTHING, *options] for options in parts))
    )
    return min((damage for saved, damage in totals if saved >= target), default=None)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 80))
@settings(max_examples=150, deadline=None)
def test_allocate_meets_the_target_and_nothing_that_saves_more_than_the_hull_is_better(parts, target):
    best = brute_force(parts, target)
    if best is None:
        with pytest.raises(ValueError, match="can be saved"):
            allocate(parts, target)
        return
    chosen = allocate(parts, target)
    assert all(one in (NOTHING, *options) for one, options in zip(chosen, parts, strict=True))
    saved, damage = sum(o.saved for o in chosen), sum(o.damage for o in chosen)
    assert saved >= target
    # The relaxed optimum lies below the best choice; the greedy is above it by one step of one part at most.
    steps = [b.damage - a.damage for options in parts for a, b in zip(hull(options), hull(options)[1:], strict=False)]
    assert best - 1e-9 <= damage <= best + max(steps) + 1e-9


def test_allocate_takes_from_the_part_that_loses_least():
    cheap = [Option(10, 1.0, 1), Option(20, 3.0, 2)]
    dear = [Option(10, 5.0, 1), Option(20, 11.0, 2)]
    assert allocate([dear, cheap], 20) == [NOTHING, cheap[1]]
    assert allocate([dear, cheap], 30) == [dear[0], cheap[1]]


def test_allocate_last_part_takes_no_more_than_is_needed():
    fine = [Option(s, 1 + s / 100, s) for s in range(10, 101)]
    assert allocate([fine], 42)[0].saved == 42


def test_hull_skips_options_above_a_chord():
    low, high, above = Option(10, 1, 1), Option(30, 9, 3), Option(20, 8, 2)
    assert hull([high, above, low, Option(10, 4, 4)]) == [NOTHING, low, high]
