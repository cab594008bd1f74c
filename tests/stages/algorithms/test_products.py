import pytest
import torch

from stages.algorithms import products
from stages.algorithms.products import gram, product, short_float


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_onednn(monkeypatch, chosen):
    """Whatever this processor would take."""
    monkeypatch.setattr(products, "_ONEDNN", chosen and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 200, 96), (300, 7, 5), (5, 0, 3), (0, 4, 3)])
@pytest.mark.parametrize("onednn", [True, False])
def test_product_is_as_exact_as_torchs_own(monkeypatch, shape, onednn):
    by_onednn(monkeypatch, onednn)
    a, b = drawn(*shape[:2]), drawn(*shape[1:], seed=1)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), exact, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)
    torch.testing.assert_close(product(b.T, a.T).double(), exact.T, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (9, 3), (200, 96), (5, 301), (0, 4), (4, 0)])
@pytest.mark.parametrize("onednn", [True, False])
def test_gram_is_as_exact_as_torchs_own_product_and_symmetric(monkeypatch, shape, onednn):
    by_onednn(monkeypatch, onednn)
    x = drawn(*shape)
    found, exact = gram(x), x.double().T @ x.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * max(1, shape[0]) ** 0.5)
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    if x.numel():
        torch.testing.assert_close(gram(x[:, 1:]), found[1:, 1:])


def test_product_of_doubles_stays_double_and_of_parts_of_a_matrix_is_right():
    a = drawn(40, 60)
    assert torch.equal(product(a.double(), a.double().T), a.double() @ a.double().T)
    torch.testing.assert_close(product(a[3:20, 5:30].T, a[3:20, 10:]), a[3:20, 5:30].T @ a[3:20, 10:])


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"avx2": True, "avx512_f": True}, torch.float32), ({}, torch.float32)]
    + [({name: True}, torch.bfloat16) for name in ("avx512_bf16", "amx_bf16", "bf16")],
)
def test_short_float_is_one_that_the_processor_multiplies(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert short_float() == expected
