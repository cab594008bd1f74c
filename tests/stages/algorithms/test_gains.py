import torch

from stages.algorithms.gains import fitted_gains


def test_fitted_gains_are_those_of_plain_least_squares():
    generator = torch.Generator().manual_seed(0)
    w_VH, y_MH = (torch.randn(size, generator=generator) for size in ((50, 6), (400, 6)))
    kept_K = torch.tensor([0, 2, 3, 5])
    z_MK = y_MH[:, kept_K] * 0.7 + 0.2 * torch.randn(400, 4, generator=generator)
    design = (z_MK[:, None, :] * w_VH[None, :, kept_K]).flatten(0, 1)
    expected = torch.linalg.lstsq(design, (y_MH @ w_VH.T).flatten()[:, None]).solution[:, 0]
    found = fitted_gains(w_VH, (z_MK.T @ z_MK).double(), (y_MH.T @ z_MK).double(), kept_K)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    assert (found - 1).abs().min() > 0.05


def test_fitted_gains_of_what_has_not_changed_are_one():
    generator = torch.Generator().manual_seed(0)
    w_VH, y_MH = (torch.randn(size, generator=generator) for size in ((50, 6), (3, 6)))
    moment_HH = (y_MH.T @ y_MH).double()
    torch.testing.assert_close(fitted_gains(w_VH, moment_HH, moment_HH, torch.arange(6)), torch.ones(6).double())
