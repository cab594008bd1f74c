import itertools
import math

import pytest

from stages.algorithms.schedule import batch, cosine


def test_cosine_rises_to_the_peak_then_falls_to_a_tenth():
    rates = [cosine(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    middle = 10 + (99 - 10) / 2
    assert cosine(55, 100, 10) == pytest.approx(0.55 + 0.45 * math.cos(math.pi * (55 - 10) / 89))
    assert rates[math.floor(middle)] > 0.55 > rates[math.ceil(middle)]
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_cosine_of_a_run_shorter_than_its_warmup_stays_positive(steps):
    assert all(0 < cosine(step, steps, 8) <= 1 for step in range(steps))
    assert cosine(0, 1, 0) == 1


def test_batches_take_every_window_once_an_epoch_in_a_new_order():
    taken = [window for step in range(10) for window in batch(step, 3, 10, seed=1)]
    epochs = [taken[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_depend_on_the_seed_and_on_nothing_else():
    assert batch(7, 3, 50, seed=1) == batch(7, 3, 50, seed=1)
    assert batch(7, 3, 50, seed=1) != batch(7, 3, 50, seed=2)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_batches_take_a_written_window_at_every_other_place_and_all_of_both_kinds_as_often(size):
    taken = [window for step in range(120 // size) for window in batch(step, size, 14, seed=1, written=4)]
    text, written = taken[0::2], taken[1::2]
    assert [sorted(text[start : start + 10]) for start in range(0, 60, 10)] == [list(range(10))] * 6
    assert [sorted(written[start : start + 4]) for start in range(0, 60, 4)] == [[10, 11, 12, 13]] * 15
    assert len({tuple(written[start : start + 4]) for start in range(0, 60, 4)}) > 3
