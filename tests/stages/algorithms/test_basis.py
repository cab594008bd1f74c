import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.algorithms.basis import cut, damped, fitted, lost, whitened


def problem(inputs, outputs, maps, seed=0):
    """Maps with different inputs' moments, of full rank and far from white."""
    draw = np.random.default_rng(seed)
    weights = [torch.from_numpy(draw.normal(size=(outputs, inputs))) for _ in range(maps)]
    moments = []
    for _ in range(maps):
        x = draw.normal(size=(4 * inputs, inputs)) * np.logspace(0, -1.5, inputs)
        moments.append(torch.from_numpy(x.T @ x / len(x)))
    importance = [torch.from_numpy(draw.uniform(0.1, 3, size=outputs)) for _ in range(maps)]
    return weights, moments, importance


def error(weights, products, moment, importance):
    """sum of importance * E (difference x)^2, straight from the definition."""
    return sum(
        float((g * torch.einsum("oi,ij,oj->o", w - p, moment, w - p)).sum())
        for w, p, g in zip(weights, products, importance, strict=True)
    )


@given(st.integers(2, 12), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_whitened_energy_equals_numpys_singular_values(inputs, outputs, maps, seed):
    weights, moments, importance = problem(inputs, outputs, maps, seed)
    system = whitened(weights, moments[0], importance)
    factor = np.linalg.cholesky(damped(moments[0]).numpy())
    stacked = np.concatenate(
        [np.sqrt(g.numpy())[:, None] * w.numpy() for w, g in zip(weights, importance, strict=True)]
    )
    singular = np.linalg.svd(stacked @ factor, compute_uv=False)
    padded = np.zeros(inputs)
    padded[: len(singular)] = singular**2
    np.testing.assert_allclose(system.energy_I.numpy(), padded, rtol=1e-8, atol=1e-9 * padded[0])


@given(st.integers(3, 10), st.integers(2, 8), st.integers(1, 3), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_cut_loses_exactly_the_energy_beyond_the_rank(inputs, outputs, maps, seed, data):
    weights, moments, importance = problem(inputs, outputs, maps, seed)
    rank = data.draw(st.integers(1, inputs))
    basis = cut(whitened(weights, moments[0], importance), rank)
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank, dtype=torch.float64), atol=1e-9, rtol=0)
    products = [fitted(w, basis, moments[0]) @ basis for w in weights]
    measured = error(weights, products, damped(moments[0]), importance)
    curve = lost(weights, moments[0], importance)
    whole = float(curve[0])
    assert measured == pytest.approx(float(curve[rank]), rel=1e-4, abs=1e-9 * whole)


def test_lost_falls_from_all_energy_to_nothing():
    weights, moments, _ = problem(6, 5, 2)
    curve = lost(weights, moments[0])
    ones = [torch.ones(5)] * 2
    assert float(curve[0]) == pytest.approx(error(weights, [0 * w for w in weights], damped(moments[0]), ones))
    assert float(curve[-1]) == 0
    assert (curve.diff() <= 0).all()


def test_cut_beats_every_other_basis_that_was_tried():
    weights, moments, importance = problem(8, 6, 2)
    least = float(lost(weights, moments[0], importance)[3])
    for seed in range(200):
        other = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
            0
        ].T
        products = [fitted(w, other, moments[0]) @ other for w in weights]
        assert error(weights, products, damped(moments[0]), importance) >= least


def test_important_outputs_keep_more_of_their_accuracy():
    weights, moments, _ = problem(10, 4, 1)
    heavy = torch.tensor([100.0, 1, 1, 1], dtype=torch.float64)
    rows = []
    for importance in (torch.ones(4), heavy):
        basis = cut(whitened(weights, moments[0], [importance]), 2)
        difference = weights[0] - fitted(weights[0], basis, moments[0]) @ basis
        rows.append(torch.einsum("oi,ij,oj->o", difference, moments[0], difference)[0])
    assert rows[1] < rows[0] / 10


def test_fitted_equals_numpys_least_squares_on_the_samples():
    draw = np.random.default_rng(3)
    x, w, basis = draw.normal(size=(60, 7)), draw.normal(size=(5, 7)), draw.normal(size=(3, 7))
    expected = np.linalg.lstsq(x @ basis.T, x @ w.T, rcond=None)[0].T
    moment = torch.from_numpy(x.T @ x / 60)
    found = fitted(torch.from_numpy(w), torch.from_numpy(basis), moment)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)  # the damping of 1e-4 is the difference
    assert not np.allclose(found.numpy(), w @ basis.T, atol=0.05)


def test_whitened_moment_of_low_rank_is_no_obstacle():
    x = torch.tensor([[1.0, 2, 0, 1]])
    weights = [torch.eye(4), 2 * torch.eye(4)]
    system = whitened(weights, x.T @ x)
    basis = cut(system, 1)
    curve = lost(weights, x.T @ x)
    assert float(curve[1] / curve[0]) < 1e-3
    torch.testing.assert_close(basis.abs(), (x / x.norm()).double(), atol=1e-3, rtol=0)


def test_refusals():
    weights, moments, _ = problem(4, 3, 1)
    with pytest.raises(ValueError, match="does not take 4 inputs"):
        whitened([weights[0][:, :3]], moments[0])
    with pytest.raises(ValueError, match="not finite"):
        whitened([weights[0] * torch.nan], moments[0])
    with pytest.raises(ValueError, match="not finite"):
        whitened(weights, moments[0] * torch.inf)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="not between 1 and 4"):
            cut(whitened(weights, moments[0]), rank)
