from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.algorithms.basis import damped
from stages.algorithms.channels import FLOOR, least_important, output_error, reconstructed, removals


def problem(outputs, channels, seed, tokens=200):
    """Correlated channels of different strength, so that magnitude alone misleads."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(channels, channels)) * np.logspace(0, -1, channels)
    a = draw.normal(size=(tokens, channels)) @ mix
    return (
        torch.from_numpy(draw.normal(size=(outputs, channels))),
        torch.from_numpy(a),
        torch.from_numpy(a.T @ a / tokens),
    )


def kept_after(channels, gone):
    return torch.tensor([j for j in range(channels) if j not in set(gone)])


def fitted_error(w, moment, kept):
    """Under the damped moment, which is what is minimized."""
    return output_error(w, damped(moment), kept, reconstructed(w, moment, kept))


@given(st.integers(1, 5), st.integers(3, 7), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_least_important_single_channel_is_the_best_of_all(outputs, channels, seed):
    w, _, moment = problem(outputs, channels, seed)
    gone = least_important(w, moment, 1).tolist()
    errors = {j: fitted_error(w, moment, kept_after(channels, [j])) for j in range(channels)}
    assert errors[gone[0]] <= min(errors.values()) * (1 + 1e-6) + 1e-12


@given(st.integers(0, 60))
@settings(max_examples=20, deadline=None)
def test_least_important_one_a_round_is_the_greedy_order(seed):
    w, _, moment = problem(3, 7, seed)
    gone = []
    for _ in range(3):
        rest = [j for j in range(7) if j not in gone]
        gone.append(min(rest, key=lambda j: fitted_error(w, moment, kept_after(7, [*gone, j]))))
    assert least_important(w, moment, 3, rounds=3).tolist() == gone


def test_least_important_subset_is_near_the_best_of_all_subsets_and_beats_magnitude():
    ratios, wins = [], 0
    for seed in range(12):
        w, _, moment = problem(4, 9, seed)
        errors = [fitted_error(w, moment, kept_after(9, gone)) for gone in combinations(range(9), 3)]
        ours = fitted_error(w, moment, kept_after(9, least_important(w, moment, 3, rounds=3).tolist()))
        weakest = (moment.diagonal() * w.square().sum(0)).argsort()[:3].tolist()
        ratios.append(ours / min(errors))
        wins += ours <= fitted_error(w, moment, kept_after(9, weakest)) * (1 + 1e-9)
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) < 1.1
    assert wins >= 10


def test_least_important_duplicate_channel_goes_for_nothing():
    w, a, _ = problem(4, 6, 0)
    a[:, 5] = a[:, 2]
    moment = a.T @ a / len(a)
    gone = least_important(w, moment, 1).tolist()
    assert gone[0] in (2, 5)
    assert fitted_error(w, moment, kept_after(6, gone)) < 1e-3


@pytest.mark.parametrize("rounds", [1, 2, 5, 16])
def test_least_important_gives_distinct_channels_whatever_the_rounds(rounds):
    w, _, moment = problem(4, 20, 1)
    gone = least_important(w, moment, 9, rounds=rounds).tolist()
    assert len(set(gone)) == len(gone) == 9
    assert least_important(w, moment, 0, rounds=rounds).tolist() == []


def test_reconstructed_equals_numpys_least_squares():
    w, a, moment = problem(4, 8, 2)
    kept = torch.tensor([0, 1, 2, 4, 7])
    expected = np.linalg.lstsq(a[:, kept].numpy(), (a @ w.T).numpy(), rcond=None)[0].T
    found = reconstructed(w, moment, kept)
    mine, best = (float(((a @ w.T - a[:, kept] @ v.T) ** 2).mean()) for v in (found, torch.from_numpy(expected)))
    assert best * (1 - 1e-9) <= mine <= best * 1.01
    assert output_error(w, moment, kept, found) == pytest.approx(mine / float(((a @ w.T) ** 2).mean()))
    assert mine < 0.9 * float(((a @ w.T - a[:, kept] @ w[:, kept].T) ** 2).mean())


def test_refusals():
    w, _, moment = problem(2, 4, 0)
    for count in (4, -1):
        with pytest.raises(ValueError, match="of 4 channels cannot go"):
            least_important(w, moment, count)
    with pytest.raises(ValueError, match="not finite"):
        least_important(w, moment * torch.nan, 1)


@pytest.mark.parametrize("seed", range(10))
def test_least_important_group_is_the_best_of_all_groups(seed):
    w, _, moment = problem(3, 8, seed)
    groups = torch.arange(8).view(4, 2)
    errors = [fitted_error(w, moment, kept_after(8, one.tolist())) for one in groups]
    assert least_important(w, moment, 2, size=2).tolist() == groups[errors.index(min(errors))].tolist()
    first, second = least_important(w, moment, 4, size=2, rounds=2).view(2, 2).tolist()
    rest = [one.tolist() for one in groups if one.tolist() != first]
    assert second == min(rest, key=lambda one: fitted_error(w, moment, kept_after(8, [*first, *one])))


def test_least_important_groups_that_do_not_divide_are_refused():
    w, _, moment = problem(3, 8, 0)
    with pytest.raises(ValueError, match="3 of 8 channels cannot go in groups of 2"):
        least_important(w, moment, 3, size=2)


@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 3])
def test_removals_tell_the_error_of_all_that_is_gone_with_the_rest_fitted(size, floor):
    w, _, moment = problem(4, 12, 5)
    found = list(removals(w, moment, 9, size=size, rounds=3, floor=floor))
    assert [len(gone) for gone, _ in found] == [3, 6, 9]
    metric = damped(moment) + floor * moment.diagonal().double().median() * torch.eye(12)
    root = torch.linalg.cholesky(metric)
    for gone, error in found:
        kept = kept_after(12, gone.tolist())
        left = torch.linalg.lstsq(root[kept].T, (w.double() @ root).T, driver="gelsd").residuals
        assert error == pytest.approx(float(left.sum()), rel=1e-6)
    assert found[-1][0].tolist() == least_important(w, moment, 9, size=size, rounds=3, floor=floor).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_channels_that_the_text_does_not_wake_stay_with_a_floor_and_go_without(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, channels = 600, 24
    w = torch.randn(16, channels, generator=generator)
    a = torch.randn(tokens, channels, generator=generator)
    rare, idle = [3, 11], [7, 19]  # of the rare each token that wakes them matters, of the idle none ever would
    a[:, rare] *= torch.rand(tokens, 2, generator=generator) < 0.001
    w[:, rare] *= 3
    w[:, idle] *= 0.05
    moment = a.T @ a / tokens
    assert set(least_important(w, moment, 4).tolist()) == {*rare, *idle}
    with_floor = least_important(w, moment, 4, floor=FLOOR).tolist()
    assert set(idle) < set(with_floor) and not set(rare) & set(with_floor)
    # Another text wakes them: there, what was kept with care loses less.
    a = torch.randn(tokens, channels, generator=generator)
    a[:, rare] *= torch.rand(tokens, 2, generator=generator) < 0.1
    other = a.T @ a / tokens
    lost = []
    for gone in (least_important(w, moment, 4).tolist(), with_floor):
        kept = kept_after(channels, gone)
        lost.append(output_error(w, other, kept, reconstructed(w, moment, kept)))
    assert lost[1] < lost[0]
