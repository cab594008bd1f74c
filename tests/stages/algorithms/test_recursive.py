import numpy as np
import pytest
import torch

from stages.algorithms.recursive import common


def problem(seed, blocks=3, spread=1.0):
    draw = np.random.default_rng(seed)
    weights = [draw.normal(size=(4, 6)) for _ in range(blocks)]
    inputs = [draw.normal(size=(50, 6)) * np.logspace(0, -spread, 6) * 10 ** draw.uniform(-1, 1) for _ in range(blocks)]
    importance = [np.full(4, draw.uniform(0.1, 10)) for _ in range(blocks)]
    return weights, inputs, importance


def found(weights, inputs, importance):
    moments = [torch.from_numpy(x.T @ x / len(x)) for x in inputs]
    return common(*([torch.from_numpy(w) for w in weights], moments, [torch.from_numpy(g) for g in importance])).numpy()


def error(made, weights, inputs, importance):
    parts = zip(weights, inputs, importance, strict=True)
    return sum(g[0] * ((x @ (w - made).T) ** 2).sum() / len(x) for w, x, g in parts)


@pytest.mark.parametrize("seed", range(5))
def test_common_equals_numpys_stacked_least_squares(seed):
    weights, inputs, importance = problem(seed)
    scaled = [np.sqrt(g[0] / len(x)) * x for x, g in zip(inputs, importance, strict=True)]
    outputs = [x @ w.T for x, w in zip(scaled, weights, strict=True)]
    oracle = np.linalg.lstsq(np.concatenate(scaled), np.concatenate(outputs), rcond=None)[0].T
    made = found(weights, inputs, importance)
    np.testing.assert_allclose(made, oracle, rtol=0.05, atol=0.01)  # damping
    assert error(made, weights, inputs, importance) <= 1.001 * error(oracle, weights, inputs, importance)


def test_common_is_at_least_as_good_as_the_mean_on_100_cases():
    for seed in range(100):
        given = problem(seed, spread=seed / 20)
        assert error(found(*given), *given) <= 1.0001 * error(np.mean(given[0], axis=0), *given)


def test_common_refuses_a_nan():
    weights, inputs, importance = problem(0)
    weights[1][0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        found(weights, inputs, importance)
