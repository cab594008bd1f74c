import numpy as np
import pytest
import torch

from stages.algorithms.basis import damped
from stages.algorithms.low_rank import cut, factors, lost


def problem(outputs, inputs, seed, spread=1.0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(300, inputs)) @ (draw.normal(size=(inputs, inputs)) * np.logspace(0, -spread, inputs))
    w, weight = draw.normal(size=(outputs, inputs)), draw.uniform(0.1, 10, size=outputs)
    return torch.from_numpy(w), torch.from_numpy(x), torch.from_numpy(weight)


def error(w, made, x, weight):
    return float((((x @ (w - made).T) ** 2) * weight).sum() / len(x))


@pytest.mark.parametrize(("outputs", "inputs"), [(6, 10), (10, 6), (8, 8)])
def test_factors_are_numpys_singular_values_and_the_cut_loses_what_they_say(outputs, inputs):
    w, x, weight = problem(outputs, inputs, 0)
    moment = x.T @ x / len(x)
    system, tail = factors(w, moment, weight), lost(w, moment, weight)
    x = torch.linalg.cholesky(damped(moment)).T * inputs**0.5  # as many rows as inputs, with the damped moment
    values = np.linalg.svd((weight.sqrt()[:, None] * w @ x.T).numpy() / np.sqrt(inputs), compute_uv=False)
    np.testing.assert_allclose(system.energy_R.numpy(), values[: len(system.energy_R)] ** 2, rtol=1e-8)
    for rank in (1, 3, min(outputs, inputs)):
        left, right = cut(system, rank)
        assert left.shape == (outputs, rank)
        torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))
        expected = float((values[rank:] ** 2).sum())
        assert error(w, left @ right, x, weight) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert float(tail[rank]) == pytest.approx(expected, rel=1e-8, abs=1e-9)
    assert tail[-1] == 0


def test_cut_is_at_least_as_good_as_plain_truncation_on_100_cases():
    for seed in range(100):
        outputs, inputs = (7, 11) if seed % 2 else (11, 7)
        w, x, weight = problem(outputs, inputs, seed, spread=seed / 25)
        left, right = cut(factors(w, x.T @ x / len(x), weight), 3)
        u, s, vt = np.linalg.svd(w.numpy())
        naive = torch.from_numpy(u[:, :3] * s[:3] @ vt[:3])
        # The damping may cost a thousandth of the energy where truncation happens to be as good.
        assert error(w, left @ right, x, weight) <= 1.001 * error(w, naive, x, weight)


def test_factors_without_importance_weigh_outputs_alike_and_an_unused_output_keeps_its_row():
    w, x, _ = problem(6, 10, 1)
    moment = x.T @ x / len(x)
    ones = factors(w, moment, torch.ones(6))
    torch.testing.assert_close(factors(w, moment).energy_R, ones.energy_R)
    weight = torch.ones(6)
    weight[2] = 0
    left, right = cut(factors(w, moment, weight), 6)
    torch.testing.assert_close(left @ right, w, rtol=1e-4, atol=1e-4)


def test_factors_refuse_a_nan_and_cut_a_rank_that_is_not_there():
    w, x, weight = problem(4, 6, 0)
    moment = x.T @ x / len(x)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and 4"):
            cut(factors(w, moment), rank)
    moment[1, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        factors(w, moment, weight)
