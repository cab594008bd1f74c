import pytest
import torch

from stages.algorithms.drawing import drawn


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
