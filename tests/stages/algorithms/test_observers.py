import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.algorithms.observers import LEVELS, OBSERVERS, entropy, percentile, squared_error


def normal(rows=200, inputs=64, seed=0):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def test_percentile_agrees_with_numpy_where_every_row_weighs_the_same():
    x = normal().abs()
    for share in (0.5, 0.9, 0.999):
        expected = np.quantile(x.numpy(), share, method="inverted_cdf")
        assert percentile(x, torch.ones(len(x)), share) == pytest.approx(float(expected))


def test_percentile_counts_a_row_as_often_as_it_stands_for_tokens():
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert percentile(x, torch.tensor([8.0, 1.0, 1.0]), 0.75) == 1.0
    assert percentile(x, torch.tensor([1.0, 1.0, 8.0]), 0.75) == 3.0


@pytest.mark.parametrize("seed", range(5))
def test_squared_error_is_no_worse_than_any_other_range(seed):
    x = normal(seed=seed) ** 3
    top = squared_error(x.abs(), torch.ones(len(x)))

    def lost(reach):
        step = reach / 127
        return float(np.square(np.clip(np.round(x.numpy() / step), -127, 127) * step - x.numpy()).mean())

    assert all(lost(top) <= lost(float(x.abs().max()) * share) * (1 + 1e-5) for share in np.arange(0.05, 1.01, 0.01))


def test_entropy_keeps_a_flat_histogram_whole_and_leaves_a_lone_outlier_out():
    flat = torch.linspace(0, 1, 200 * 64)[torch.randperm(200 * 64)].view(200, 64)
    assert entropy(flat, torch.ones(200)) > 0.95
    lone = normal().abs()
    lone[0, 0] = 40.0
    assert entropy(lone, torch.ones(200)) < 10
    assert percentile(lone, torch.ones(200)) < 10
    assert squared_error(lone, torch.ones(200)) < 40


def test_entropy_of_a_histogram_that_fits_the_levels_is_nothing_lost():
    x = (torch.arange(LEVELS).float() / LEVELS).repeat(20, 1)
    assert entropy(x, torch.ones(20)) == pytest.approx(float(x.max()), rel=0.07)


@pytest.mark.parametrize("name", OBSERVERS)
@given(seed=st.integers(0, 1000), power=st.integers(-10, 10))
def test_every_observer_stays_within_the_largest_and_follows_the_scale(name, seed, power):
    x = normal(rows=16, inputs=32, seed=seed).abs()
    weight = torch.ones(16)
    reach = OBSERVERS[name](x, weight)
    assert 0 < reach <= float(x.max()) * (1 + 1e-6)
    # By a power of two no bin's edge moves past a value.
    assert OBSERVERS[name](x * 2.0**power, weight) == pytest.approx(reach * 2.0**power, rel=1e-5)


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_gives_nothing_for_zeros(name):
    assert OBSERVERS[name](torch.zeros(4, 8), torch.ones(4)) == 0.0
