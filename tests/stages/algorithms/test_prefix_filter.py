"""Near duplicates by the prefix filter, against comparing every pair."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.algorithms.prefix_filter import first_of_each

SETS = st.lists(st.frozensets(st.integers(0, 12), max_size=9), max_size=25)


def every_pair(sets: list[frozenset[int]], threshold: Fraction) -> list[bool]:
    kept: list[frozenset[int]] = []
    keep = []
    for one in sets:
        near = any(one and other and Fraction(len(one & other), len(one | other)) >= threshold for other in kept)
        keep.append(not near)
        if not near:
            kept.append(one)
    return keep


THRESHOLDS = [(0.5, Fraction(1, 2)), (0.8, Fraction(4, 5)), (0.75, Fraction(3, 4)), (1.0, Fraction(1))]


@settings(deadline=None, max_examples=300)
@given(SETS, st.sampled_from(THRESHOLDS))
def test_kept_sets_equal_those_of_comparing_every_pair(
    sets: list[frozenset[int]], threshold: tuple[float, Fraction]
) -> None:
    assert first_of_each(sets, threshold[0]) == every_pair(sets, threshold[1])


def test_copy_with_one_word_changed_is_left_out_and_another_text_is_kept() -> None:
    words = [f"w{i}" for i in range(40)]
    changed = words.copy()
    changed[20] = "other"
    triples = [{tuple(text[i : i + 3]) for i in range(38)} for text in (words, changed, words[::-1])]
    assert first_of_each(triples, 0.8) == [True, False, True]


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        first_of_each([], threshold)
