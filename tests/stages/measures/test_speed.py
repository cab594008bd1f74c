"""Figures of rounds against numpy's quantiles and against every resample there is."""

from itertools import product
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.measures.interval import of_ratios, of_rounds
from stages.measures.table import SPEEDS, foremost_speed

ROUNDS = st.lists(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=6), min_size=2, max_size=6)


@settings(max_examples=25)
@given(ROUNDS, st.sampled_from([0.5, 0.95, 0.99]))
def test_of_rounds_point_is_the_quantile_of_all_values_and_lies_between_the_ends(rounds, quantile):
    found = of_rounds(rounds, quantile)
    assert found.point == pytest.approx(
        np.quantile([one for some in rounds for one in some], quantile, method="averaged_inverted_cdf"), rel=1e-12
    )
    assert min(map(min, rounds)) <= found.low <= found.point <= found.high <= max(map(max, rounds))


def test_of_rounds_interval_covers_what_nearly_every_resample_says():
    rounds = [[3.0], [1.0], [2.0], [10.0], [4.0]]
    medians = sorted(median(drawn) for drawn in product([one for (one,) in rounds], repeat=5))
    low, high = (np.quantile(medians, at, method="inverted_cdf") for at in (0.025, 0.975))
    found = of_rounds(rounds)
    assert found.point == 3.0
    assert of_rounds(rounds[:4]).point == 2.5
    assert found.low <= low and found.high >= high


def test_of_ratios_is_the_median_of_each_rounds_own_ratio_whatever_slows_a_round():
    theirs = [[10.0, 10.0], [20.0, 20.0], [1000.0, 1000.0]]
    ours = [[5.0, 5.0], [10.0, 10.0], [500.0, 500.0]]
    assert of_ratios(ours, theirs) == of_ratios(ours[:1] * 3, theirs[:1] * 3)
    assert of_ratios(ours, theirs).point == of_ratios(ours, theirs).low == of_ratios(ours, theirs).high == 0.5
    assert of_ratios([[1.0, 9.0]] * 2, [[1.0, 3.0]] * 2, 0.99).point == pytest.approx(3.0)


def test_every_task_has_a_measure_that_stands_for_its_speed():
    assert foremost_speed("generate") == foremost_speed("translate") == "decode_tokens_per_s"
    assert foremost_speed("embed") == foremost_speed("classify") == "items_per_s"
    assert all(one.faster == name.endswith(("_per_s", "_share")) for name, one in SPEEDS.items())
