import numpy as np
import pytest
import torch

from stages.algorithms.drawing import drawn, drawn_from_nucleus


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_indices_are_drawn_as_often_as_their_values_say():
    p_V = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.25, 0.05, 0.0])
    counts_V = torch.bincount(drawn(p_V.expand(100_000, -1), generator()), minlength=7)
    assert counts_V[p_V == 0].sum() == 0
    expected_V = 100_000 * p_V[p_V > 0]
    # Pearson's statistic of three degrees of freedom: above 16.3 once in a thousand.
    assert float(((counts_V[p_V > 0] - expected_V) ** 2 / expected_V).sum()) < 16.3


def test_rows_need_not_sum_to_one_and_each_has_its_own_draw():
    p_NV = torch.eye(64)[torch.randperm(64, generator=generator(1))] * torch.logspace(-20, 20, 64)[:, None]
    assert torch.equal(drawn(p_NV, generator()), p_NV.argmax(1))


@pytest.mark.parametrize("seed", range(5))
def test_last_index_with_a_value_is_the_last_that_is_drawn(seed):
    """The running sum of many small numbers is rounded; what is drawn must still have a value."""
    p_NV = torch.rand(50, 49_152, generator=generator(seed))
    p_NV[:, 40_000:] = 0
    index_N = drawn(p_NV, generator(seed))
    assert int(index_N.max()) < 40_000
    assert (p_NV.gather(1, index_N[:, None]) > 0).all()


def test_same_seed_draws_the_same():
    p_NV = torch.rand(8, 100, generator=generator())
    assert torch.equal(drawn(p_NV, generator(3)), drawn(p_NV, generator(3)))
    assert not torch.equal(drawn(p_NV, generator(3)), drawn(p_NV, generator(4)))


def numbers(count, seed=0):
    return [np.random.default_rng([seed, n]).random for n in range(count)]


def cut(p_V, nucleus):
    """What is left of a distribution, by sorting it."""
    order = torch.argsort(p_V, descending=True)
    before = p_V[order].cumsum(0) - p_V[order]
    left = torch.zeros_like(p_V)
    left[order[before < nucleus * p_V.sum()]] = p_V[order[before < nucleus * p_V.sum()]]
    return left / left.sum()


@pytest.mark.parametrize("nucleus", [0.05, 0.3, 0.6, 0.95, 1.0])
def test_nucleus_is_drawn_from_as_a_sorted_distribution_that_is_cut(nucleus):
    p_V = torch.tensor([0.02, 0.3, 0.1, 0.0, 0.25, 0.2, 0.13], dtype=torch.float64) * 3
    wanted_V = cut(p_V, nucleus)
    counts_V = torch.bincount(drawn_from_nucleus(p_V.expand(20_000, -1), nucleus, numbers(20_000)), minlength=7)
    assert counts_V[wanted_V == 0].sum() == 0
    assert (wanted_V > 0).sum() == {0.05: 1, 0.3: 1, 0.6: 3, 0.95: 5, 1.0: 6}[nucleus]
    expected_V = 20_000 * wanted_V[wanted_V > 0]
    # Pearson's statistic of at most five degrees of freedom: above 20.5 once in a thousand.
    assert float(((counts_V[wanted_V > 0] - expected_V) ** 2 / expected_V).sum()) < 20.5


def test_nucleus_draws_of_a_row_do_not_depend_on_the_others():
    p_NV = torch.rand(40, 1000, generator=generator(2), dtype=torch.float64) ** 6
    whole = drawn_from_nucleus(p_NV, 0.5, numbers(40))
    rows = [31, 4, 17]
    assert torch.equal(drawn_from_nucleus(p_NV[rows], 0.5, [numbers(40)[n] for n in rows]), whole[rows])
    assert not torch.equal(drawn_from_nucleus(p_NV, 0.5, numbers(40, seed=1)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_next_to_one_draws_the_last_that_has_a_value(dtype):
    p_NV = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0]], dtype=dtype)
    assert drawn_from_nucleus(p_NV, 1.0, [lambda: 1 - 2**-53]).tolist() == [2]


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_nucleus_of_what_is_no_distribution_is_refused(values):
    with pytest.raises(ValueError, match="no distribution"):
        drawn_from_nucleus(torch.tensor([values, [1.0, 0.0]], dtype=torch.float64), 0.9, numbers(2))
