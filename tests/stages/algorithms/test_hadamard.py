import pytest
import scipy.linalg
import torch

from stages.algorithms.hadamard import hadamard, rotation

UNKNOWN_HERE = {52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244}


@pytest.mark.parametrize("order", [*range(1, 257), 576, 896, 1536, 2560, 3584])
def test_hadamard_of_every_order_has_orthogonal_rows_of_signs_or_is_none(order):
    h_NN = hadamard(order)
    assert (h_NN is None) == (order in UNKNOWN_HERE or (order > 2 and order % 4 != 0))
    if h_NN is not None:
        assert h_NN.shape == (order, order)
        assert bool((h_NN.abs() == 1).all())
        assert torch.equal(h_NN @ h_NN.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_hadamard_of_a_power_of_two_is_scipys(order):
    assert torch.equal(hadamard(order), torch.from_numpy(scipy.linalg.hadamard(order)).double())


@pytest.mark.parametrize("order", [3, 12, 64, 100, 128])
def test_rotation_is_orthogonal_and_drawn_by_its_seed(order):
    r_NN = rotation(order)
    assert torch.allclose(r_NN.T @ r_NN, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.equal(r_NN, rotation(order))
    assert not torch.equal(r_NN, rotation(order, seed=1))


@pytest.mark.parametrize("order", [12, 20, 64])
def test_rotation_by_a_hadamard_matrix_spreads_one_outlier_evenly(order):
    outlier = torch.zeros(order, dtype=torch.float64)
    outlier[5] = 7.0
    assert torch.allclose((outlier @ rotation(order)).abs(), torch.full_like(outlier, 7 / order**0.5))
