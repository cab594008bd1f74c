import numpy as np
import pytest
import torch

from stages.algorithms import low_rank
from stages.algorithms.basis import damped
from stages.algorithms.low_rank_sparse import split, within
from stages.algorithms.positions import affordable, least


def problem(outputs, inputs, seed, spread):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(4 * inputs, inputs)) @ (draw.normal(size=(inputs, inputs)) * np.logspace(0, -spread, inputs))
    w, weight = draw.normal(size=(outputs, inputs)), draw.uniform(0.1, 10, size=outputs)
    return torch.from_numpy(w).float(), torch.from_numpy(x.T @ x / len(x)).float(), torch.from_numpy(weight).float()


def error(gap, moment, weight):
    """By the outputs themselves, on inputs whose moment is the damped one."""
    x = np.linalg.cholesky(damped(moment).numpy()).T
    return float((((x @ gap.double().numpy().T) ** 2) * weight.numpy()).sum())


def whole(found):
    return found.left_Or @ found.right_rI + found.sparse_OI


def test_split_finds_a_planted_product_and_its_planted_weights():
    draw = np.random.default_rng(3)
    _, moment, weight = problem(40, 48, 5, 0.0)
    planted = np.zeros((40, 48), dtype=np.float32)
    planted.flat[draw.choice(40 * 48, 60, replace=False)] = 4 * draw.choice([-1, 1], 60)
    product = draw.normal(size=(40, 3)) @ draw.normal(size=(3, 48)) / 2
    w = torch.from_numpy(product.astype(np.float32) + planted)
    found = split(w, moment, 3, 60, weight)
    assert ((found.sparse_OI != 0).numpy() == (planted != 0)).mean() > 0.995
    alone = split(w, moment, 9, 0, weight)
    assert found.error < 0.02 * alone.error
    assert int((found.sparse_OI != 0).sum()) <= 60


def test_split_error_is_that_of_its_outputs_and_its_product_is_numpys_best_for_its_weights():
    w, moment, weight = problem(10, 14, 0, 1.0)
    found = split(w, moment, 3, 20, weight)
    assert found.error == pytest.approx(error(w - whole(found), moment, weight), rel=1e-4)
    x = np.linalg.cholesky(damped(moment).numpy()).T
    rest = np.sqrt(weight.numpy())[:, None] * (w - found.sparse_OI).numpy() @ x.T
    tail = np.linalg.svd(rest, compute_uv=False)[3:]
    assert found.error == pytest.approx(float((tail**2).sum()), rel=1e-4)


def test_split_gains_most_of_what_the_best_of_all_places_of_one_weight_would():
    """Every place is tried, with the best product and value there by many alternations."""
    gained = []
    for seed in range(20):
        w, moment, weight = problem(4, 5, seed, 0.5)
        alone, ours = (split(w, moment, 1, kept, weight).error for kept in (0, 1))
        best = min(alternated(w.double(), moment, weight, row, column) for row in range(4) for column in range(5))
        assert best * (1 - 1e-4) <= ours <= alone
        gained.append((alone - ours) / (alone - best))
    assert np.mean(gained) > 0.6


def alternated(w, moment, weight, row, column):
    m = damped(moment)
    sparse, value = torch.zeros_like(w), 0.0
    for _ in range(60):
        sparse[row, column] = value
        left, right = low_rank.cut(low_rank.factors(w - sparse, moment, weight), 1)
        value = float(((w - left @ right)[row] @ m)[column] / m[column, column])
    return error(w - left @ right - sparse, moment, weight)


def test_within_a_budget_is_never_worse_than_the_product_alone_on_100_cases():
    better = 0
    for seed in range(100):
        outputs, inputs = [(24, 40), (40, 24), (32, 32)][seed % 3]
        w, moment, weight = problem(outputs, inputs, seed, spread=seed / 20)
        found, alone = within(w, moment, 10, 2 + seed % 7, weight)
        left, right = low_rank.cut(low_rank.factors(w, moment, weight), 10)
        assert error(w - whole(found), moment, weight) <= (1 + 1e-4) * error(w - left @ right, moment, weight)
        kept = int((found.sparse_OI != 0).sum())
        spent = len(found.right_rI) * (outputs + inputs) + kept + (least(outputs, inputs, kept)[1] / 4 if kept else 0)
        assert spent <= 10 * (outputs + inputs)
        better += found is not alone
    assert better > 50


def test_within_takes_the_product_alone_where_that_is_exact():
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(24, 6, generator=draw) @ torch.randn(6, 40, generator=draw)
    _, moment, weight = problem(24, 40, 0, 1.0)
    found, alone = within(w, moment, 6, 2, weight)
    assert found is alone
    assert not found.sparse_OI.any()
    assert len(found.right_rI) == 6


def test_the_full_moment_beats_its_diagonal():
    """The same alternation with the moment's diagonal alone, as OATS has it, judged by the outputs."""
    ours, theirs = 0.0, 0.0
    for seed in range(10):
        w, moment, weight = problem(24, 40, seed, 1.0)
        kept = affordable(24, 40, 4 * 64)
        ours += np.log(error(w - whole(split(w, moment, 6, kept, weight)), moment, weight))
        diagonal = split(w, torch.diag(moment.diagonal()), 6, kept, weight)
        theirs += np.log(error(w - whole(diagonal), moment, weight))
    assert ours < theirs - 1


def test_split_refuses_a_nan_and_more_weights_than_there_are():
    w, moment, _ = problem(4, 6, 0, 0.0)
    for kept in (-1, 25):
        with pytest.raises(ValueError, match=f"{kept} weights are not between 0 and 24"):
            split(w, moment, 1, kept)
    with pytest.raises(ValueError, match="rank 5 is not between 1 and 4"):
        split(w, moment, 5, 1)
    w[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        split(w, moment, 1, 1)
