"""Near duplicates by the prefix filter, against comparing every pair."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.algorithms.prefix_filter import first_of_each, shingles

SETS = st.lists(st.frozensets(st.integers(0, 12), max_size=9), max_size=25)


def every_pair(sets: Sequence[AbstractSet[Hashable]], threshold: Fraction) -> list[bool]:
    kept: list[AbstractSet[Hashable]] = []
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
    numbers = [np.array(sorted(one), np.uint64) for one in sets]
    assert first_of_each(numbers, threshold[0]) == every_pair(sets, threshold[1])


def test_copy_with_one_word_changed_is_left_out_and_another_text_is_kept() -> None:
    words = [f"w{i}" for i in range(40)]
    changed = words.copy()
    changed[20] = "other"
    triples = [shingles(text, 3) for text in (words, changed, words[::-1])]
    assert first_of_each(triples, 0.8) == [True, False, True]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["a", "b", "c", "", "\ud800"]), max_size=30), st.integers(1, 4))
def test_shingles_are_one_number_for_each_run_of_words(words: list[str], length: int) -> None:
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    found = shingles(words, length)
    assert len(found) == len(set(runs))
    assert set(found.tolist()) == {shingles(run, length).item() for run in runs}


def test_copies_among_reference_prose_are_those_that_comparing_the_words_finds(reference: str) -> None:
    texts = [part.split() for part in reference.split("\n\n") if len(part.split()) >= 8][:400]
    for n in range(0, 400, 4):  # copies with a word changed, near and not so near
        texts.append([*texts[n][:-1], "changed"])
    words = [frozenset(tuple(text[i : i + 3]) for i in range(len(text) - 2)) for text in texts]
    kept = every_pair(words, Fraction(4, 5))
    assert 20 < kept.count(False) < 300
    assert first_of_each([shingles(text, 3) for text in texts], 0.8) == kept


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        first_of_each([], threshold)
