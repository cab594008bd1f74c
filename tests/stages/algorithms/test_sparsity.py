import pytest
import torch

from stages.algorithms.sparsity import SPARSE, is_sparse, largest, of_each, packed, prices, unpacked, wanda


def test_of_each_keeps_the_largest_of_every_group():
    score = torch.tensor([[1.0, 4, 3, 2, 9, 8, 0, 7], [5, 5, 5, 5, 1, 2, 3, 4]])
    assert of_each(2, 4)(score).tolist() == [
        [False, True, True, False, True, True, False, False],
        [*of_each(2, 4)(score)[1, :4].tolist(), False, False, True, True],
    ]
    assert (of_each(2, 4)(score).unflatten(1, (-1, 4)).sum(2) == 2).all()  # ties too
    with pytest.raises(ValueError, match="groups of 4 do not divide 6"):
        of_each(2, 4)(score[:, :6])
    with pytest.raises(ValueError, match="no pattern"):
        of_each(4, 4)


def test_largest_keeps_a_share_of_all():
    score = torch.arange(12.0).view(3, 4)
    assert largest(0.25)(score).flatten().nonzero().flatten().tolist() == [9, 10, 11]
    assert largest(0.24)(score).sum() == 2
    with pytest.raises(ValueError, match="outside"):
        largest(1.5)


def test_wanda_is_the_error_of_one_weight_gone():
    torch.manual_seed(0)
    w, x = torch.randn(3, 5), torch.randn(200, 5)
    score = wanda(w, x.T @ x / 200)
    for o, i in ((0, 0), (2, 4)):
        cut = w.clone()
        cut[o, i] = 0
        assert float(((x @ (w - cut).T) ** 2).sum(1).mean()) == pytest.approx(float(score[o, i]), rel=1e-4)


def test_prices_are_half_the_weighted_scores_of_what_goes():
    torch.manual_seed(0)
    w, moment, importance = torch.randn(4, 6), torch.diag(torch.rand(6)), torch.rand(4)
    found = prices(w, moment, importance, (0.5, 1.0))
    score = (w**2 * moment.diagonal() * importance[:, None]).flatten().sort().values
    assert [(one.saved, one.rank) for one in found] == [(12, 0)]
    assert found[0].damage == pytest.approx(float(score[:12].sum() / 2), rel=1e-5)


@pytest.mark.parametrize("inputs", [1, 7, 8, 17])
def test_packed_masks_return_as_they_were(inputs):
    mask = torch.rand(5, inputs, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = packed(mask)
    assert bits.shape == (5, -(-inputs // 8))
    assert torch.equal(unpacked(bits, inputs), mask)
    assert packed(torch.tensor([[True, False, False, True]])).tolist() == [[0b1001]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_a_grid_of_few_values_are_not_those_of_pruning(dtype):
    w_OI = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    grid_OI = (w_OI / (w_OI.abs().amax(1, keepdim=True) / 7)).round() * w_OI.abs().amax(1, keepdim=True) / 7
    assert float((grid_OI == 0).float().mean()) > 2 * SPARSE
    assert not is_sparse(grid_OI.to(dtype)) and not is_sparse(w_OI.to(dtype))
    for kept, group in ((2, 4), (4, 8)):
        cut_OI = grid_OI * of_each(kept, group)(grid_OI.abs())
        assert is_sparse(cut_OI.to(dtype)), (kept, group)
    for share in (0.05, 0.5, 0.9):
        cut_OI = torch.where(w_OI.abs() > w_OI.abs().flatten().quantile(share), w_OI, 0.0)
        assert is_sparse(cut_OI.to(dtype)), share
