from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from stages.algorithms.basis import damped
from stages.algorithms.refit import output_errors, refit
from stages.algorithms.sparsegpt import DAMPING, pruned
from stages.algorithms.sparsity import by_rows, largest, of_each


def problem(outputs, inputs, seed, spread=1.0, tokens=400):
    """Weights and the moment of correlated inputs whose directions differ in strength by `spread` powers of ten."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(tokens, inputs)) @ (draw.normal(size=(inputs, inputs)) * np.logspace(0, -spread, inputs))
    return torch.from_numpy(draw.normal(size=(outputs, inputs))).float(), torch.from_numpy(x.T @ x / tokens).float()


def exact(w_OI, moment_II, mask_OI):
    """Row by row least squares under a mask, by numpy."""
    moment = moment_II.double().numpy()
    made = np.zeros(w_OI.shape)
    for row, (w_I, mask_I) in enumerate(zip(w_OI.double().numpy(), mask_OI.numpy(), strict=True)):
        kept = np.flatnonzero(mask_I)
        made[row, kept] = np.linalg.solve(moment[np.ix_(kept, kept)], moment[kept] @ w_I)
    return torch.from_numpy(made)


def output_error(target_OI, new_OI, moment_II):
    """E||(target - new) x||^2 / E||target x||^2, by numpy."""
    target, new, moment = (one.double().numpy() for one in (target_OI, new_OI, moment_II))
    return float(
        np.einsum("oi,ij,oj", target - new, moment, target - new) / np.einsum("oi,ij,oj", target, moment, target)
    )


def test_output_errors_are_right_to_three_digits():
    w, moment = problem(64, 96, 5)
    made = [w * 0.99, w + torch.randn(w.shape, generator=torch.Generator().manual_seed(0)), torch.zeros_like(w)]
    assert output_errors(w, made, moment) == pytest.approx([output_error(w, one, moment) for one in made], rel=5e-3)


def test_by_rows_keeps_in_each_map_what_its_own_rule_keeps():
    score = torch.rand(9, 8, generator=torch.Generator().manual_seed(0))
    kept = by_rows([largest(0.25), of_each(2, 4), largest(0.75)], [2, 3, 4])(score)
    assert [int(part.sum()) for part in kept.split([2, 3, 4])] == [4, 12, 24]
    assert torch.equal(kept[:2], largest(0.25)(score[:2]))


def test_sparsegpt_with_the_last_columns_gone_is_exact_least_squares():
    # What goes last can be made up for by nobody after it, what goes first by all: with the kept columns at the end the
    # column by column solution is the exact one.
    w, moment = problem(3, 12, 0)
    gone_first = lambda score: (torch.arange(12) >= 5).expand(len(score), 12)  # noqa: E731
    ours = pruned(w, moment, gone_first, 12)
    oracle = exact(w, damped(moment, DAMPING), gone_first(w))
    torch.testing.assert_close(ours.double(), oracle, rtol=1e-4, atol=1e-5)


def surgeon(w_OI, moment_II, kept, group):
    """Optimal brain surgeon by its definition: after each column the inverse of what is left is computed anew."""
    w, hessian, inputs = w_OI.double().numpy().copy(), damped(moment_II, DAMPING).numpy(), w_OI.shape[1]
    mask = np.ones(w.shape, dtype=bool)
    for column in range(inputs):
        inverse = np.linalg.inv(hessian[column:, column:])
        if column % group == 0:
            ends = [np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(column, column + group)]
            score = w[:, column : column + group] ** 2 / ends
            for row, order in enumerate(score.argsort(axis=1)):
                mask[row, column + order[: group - kept]] = False
        for row in np.flatnonzero(~mask[:, column]):
            w[row, column:] -= w[row, column] / inverse[0, 0] * inverse[0]
            w[row, column] = 0
    return torch.from_numpy(w)


@pytest.mark.parametrize("inputs", [8, 136])
def test_sparsegpt_equals_the_optimal_brain_surgeon_column_by_column(inputs):
    w, moment = problem(3, inputs, 5, spread=0.5)
    torch.testing.assert_close(
        pruned(w, moment, of_each(2, 4), 4).double(), surgeon(w, moment, 2, 4), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("seed", range(10))
def test_sparsegpt_after_the_refit_comes_close_to_the_best_of_all_masks(seed):
    w, moment = problem(1, 8, seed)
    sound = damped(moment, DAMPING).float()
    masks = []
    for left in combinations(range(4), 2):
        for right in combinations(range(4, 8), 2):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, [*left, *right]] = True
            masks.append(output_error(w, exact(w, sound, mask), sound))
    started = pruned(w, moment, of_each(2, 4), 4)
    ours = output_error(w, refit(started, w, sound, started != 0), sound)
    assert min(masks) * (1 - 1e-5) <= ours
    assert ours <= sorted(masks)[len(masks) // 3]


def test_sparsegpt_refitted_is_at_least_as_good_as_magnitude_on_100_cases():
    for seed in range(100):
        w, moment = problem(6, 16, seed, spread=seed / 25)
        ours = pruned(w, moment, of_each(2, 4), 4)
        assert (ours.unflatten(1, (-1, 4)) != 0).sum(2).max() == 2
        naive = w * of_each(2, 4)(w.abs())
        sound = damped(moment, DAMPING).float()
        assert output_error(w, refit(ours, w, sound, ours != 0), sound) <= output_error(w, naive, sound)


def test_sparsegpt_share_is_kept_over_all_rows_and_columns_beyond_one_span():
    w, moment = problem(5, 192, 1)
    ours = pruned(w, moment, largest(0.5), 64)
    assert (ours != 0).sum() == 5 * 192 / 2
    assert output_error(w, ours, moment) < output_error(w, w * (ours != 0), moment)


@pytest.mark.parametrize("spread", [0.0, 2.0, 5.0])
def test_refit_reaches_numpys_least_squares_and_never_makes_worse(spread):
    w, moment = problem(4, 24, 3, spread)
    sound = damped(moment, DAMPING).float()
    mask = of_each(2, 4)(w.abs())
    errors = [output_error(w, refit(w * mask, w, sound, mask, steps), sound) for steps in (0, 1, 3, 10, 60)]
    best = output_error(w, exact(w, sound, mask), sound)
    assert all(later <= before * (1 + 1e-6) for before, later in pairwise(errors))
    assert errors[-1] == pytest.approx(best, rel=1e-3)
    assert (refit(w * mask, w, sound, mask)[~mask] == 0).all()


def test_refit_of_what_is_exact_already_stays_finite():
    w, moment = problem(2, 8, 0)
    torch.testing.assert_close(refit(w, w, moment, torch.ones_like(w, dtype=torch.bool)), w)


def test_sparsegpt_refuses_what_is_not_finite_and_groups_that_do_not_divide():
    w, moment = problem(2, 8, 0)
    with pytest.raises(ValueError, match="groups of 3 do not divide 8"):
        pruned(w, moment, of_each(1, 3), 3)
    moment[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        pruned(w, moment, of_each(2, 4), 4)
