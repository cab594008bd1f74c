import pytest
import torch

from stages.algorithms.lora import Factors, begun, merged, slopes


def test_update_that_just_began_changes_nothing():
    w_OI = torch.randn(6, 9)
    factors = begun((6, 9), 3, torch.Generator().manual_seed(1))
    assert torch.equal(merged(w_OI, factors), w_OI)
    assert factors.down_rI.abs().min() > 0


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_gradients_of_the_factors_equal_autograd_through_the_merged_matrix(rank):
    torch.manual_seed(0)
    w_OI, x_NI, y_NO = torch.randn(6, 9), torch.randn(20, 9), torch.randn(20, 6)
    up_Or, down_rI = torch.randn(6, rank, requires_grad=True), torch.randn(rank, 9, requires_grad=True)
    (x_NI @ (w_OI + up_Or @ down_rI).t() - y_NO).square().sum().backward()
    factors = Factors(up_Or.detach(), down_rI.detach())
    whole_OI = merged(w_OI, factors).requires_grad_()
    (x_NI @ whole_OI.t() - y_NO).square().sum().backward()
    found = slopes(whole_OI.grad, factors)
    torch.testing.assert_close(found.up_Or, up_Or.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.down_rI, down_rI.grad, rtol=1e-4, atol=1e-3)


def test_descent_on_the_factors_finds_a_low_rank_update_on_100_random_cases():
    """From nothing, down-and-up descent comes nearer to a rank-2 target than the frozen matrix, in every case."""
    generator = torch.Generator().manual_seed(0)
    for case in range(100):
        scale_I = torch.logspace(0, -(case % 4), 9)  # well- and ill-conditioned
        w_OI = torch.randn(6, 9, generator=generator)
        gap_OI = torch.randn(6, 2, generator=generator) @ (torch.randn(2, 9, generator=generator) * scale_I)
        factors = begun((6, 9), 2, generator)
        for _ in range(300):
            g_OI = merged(w_OI, factors) - (w_OI + gap_OI)
            step = slopes(g_OI, factors)
            rate = 0.5 / max(factors.up_Or.norm() ** 2, factors.down_rI.norm() ** 2)
            factors = Factors(factors.up_Or - rate * step.up_Or, factors.down_rI - rate * step.down_rI)
        assert (merged(w_OI, factors) - w_OI - gap_OI).norm() < 0.9 * gap_OI.norm()
        assert torch.linalg.matrix_rank(merged(w_OI, factors) - w_OI, rtol=1e-4) <= 2


@pytest.mark.parametrize("rank", [0, 7])
def test_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} must lie in 1..6"):
        begun((6, 9), rank, torch.Generator())
