import itertools

import pytest
import torch

from stages.algorithms.correction import agreement, corrected, inverse_root
from stages.algorithms.gptq import gptq
from stages.algorithms.grids import GRIDS, INT4


def case(seed, outputs=6, inputs=32, tokens=64, spread=3.0):
    """A map and its inputs' moment; a large spread makes it ill-conditioned."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=made)
    x_NI = torch.randn(tokens, inputs, generator=made) @ mixing * torch.logspace(0, -spread, inputs)
    return torch.randn(outputs, inputs, generator=made), x_NI.T @ x_NI / tokens


def peak(w_OB, importance_B):
    return w_OB.abs().amax(1).clamp_min(1e-8) / 7


def error(w_OI, new_OI, moment_II):
    away = (w_OI - new_OI).double()
    return float(((away @ moment_II.double()) * away).sum())


def spread_out(v_OI, scale_OG):
    return (v_OI.unflatten(1, (scale_OG.shape[1], -1)) * scale_OG[..., None]).flatten(1)


def damped(moment_II, share=0.01):
    return moment_II.double() + share * moment_II.diagonal().mean() * torch.eye(len(moment_II))


def by_least_squares(w_OI, moment_II, scale_O):
    """After each column the rest is solved again, exactly, with what was rounded held fixed."""
    moment, w = damped(moment_II), w_OI.double().clone()
    v_OI = torch.zeros_like(w)
    for column in range(w.shape[1]):
        v_OI[:, column] = INT4.nearest(w[:, column] / scale_O)
        fixed, free = slice(0, column + 1), slice(column + 1, None)
        missed = w_OI[:, fixed].double() - v_OI[:, fixed] * scale_O[:, None]
        if column + 1 < w.shape[1]:
            pull = missed @ moment[fixed, free]
            w[:, free] = w_OI[:, free] + torch.linalg.solve(moment[free, free], pull.T).T
    return v_OI


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_gptq_rounds_as_exact_least_squares_after_each_column_would(spread):
    w_OI, moment_II = case(1, inputs=80, tokens=200, spread=spread)
    v_OI, scale_OG = gptq(w_OI, inverse_root(moment_II), INT4.nearest, peak, None)
    expected = by_least_squares(w_OI, moment_II, scale_OG[:, 0].double())
    assert (v_OI != expected).float().mean() < 0.01  # ties of rounding in float32
    assert error(w_OI, v_OI * scale_OG, moment_II) == pytest.approx(
        error(w_OI, expected * scale_OG, moment_II), rel=0.02
    )


def test_gptq_comes_near_the_best_of_all_roundings_on_a_tiny_map():
    ratios = []
    for seed in range(12):
        w_OI, moment_II = case(seed, outputs=1, inputs=5, spread=1.0)
        v_OI, scale_OG = gptq(w_OI, inverse_root(moment_II), INT4.nearest, peak, None)
        low = torch.floor(w_OI / scale_OG)
        every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=5)))
        choices = (low + every).clamp(-8, 7) * scale_OG
        away = (w_OI - choices).double()
        best = float(((away @ moment_II.double()) * away).sum(1).min())
        ratios.append((error(w_OI, v_OI * scale_OG, moment_II) + 1e-12) / (best + 1e-12))
    assert min(ratios) < 1.0001
    assert sorted(ratios)[6] < 2.5


def test_gptq_is_no_worse_than_rounding_to_nearest_in_a_hundred_cases():
    gained = []
    for seed in range(100):
        grid = list(GRIDS.values())[seed % len(GRIDS)]
        w_OI, moment_II = case(seed, spread=(seed % 10) / 2, tokens=(16, 64, 256)[seed % 3])

        def scales(w_OB, importance_B, grid=grid):
            return w_OB.abs().amax(1).clamp_min(1e-8) / grid.top

        v_OI, scale_OG = gptq(w_OI, inverse_root(moment_II), grid.nearest, scales, 8)
        naive = torch.cat(
            [grid.nearest(w / scales(w, None)[:, None]) * scales(w, None)[:, None] for w in w_OI.split(8, 1)], 1
        )
        gained.append(error(w_OI, spread_out(v_OI, scale_OG), moment_II) / error(w_OI, naive, moment_II))
    assert max(gained) <= 1.0 + 1e-9
    assert sorted(gained)[50] < 0.7


def test_gptq_of_weights_on_the_grid_changes_nothing():
    _, moment_II = case(3, outputs=4)
    scale_OG = torch.rand(4, 4) + 0.5
    q_OI = torch.randint(-8, 8, (4, 32)).float()
    q_OI[:, ::8] = 7
    w_OI = spread_out(q_OI, scale_OG)
    v_OI, found_OG = gptq(w_OI, inverse_root(moment_II), INT4.nearest, lambda w_OB, _: w_OB[:, 0] / 7, 8)
    assert torch.equal(v_OI, q_OI)
    torch.testing.assert_close(found_OG, scale_OG)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w, m: (w, m, 5), "32 inputs cannot be cut into blocks of 5"),
        (lambda w, m: (w.fill_(torch.nan), m, 8), "NaN"),
    ],
)
def test_gptq_of_what_cannot_be_rounded_is_refused(change, match):
    w_OI, moment_II, block = change(*case(0))
    with pytest.raises(ValueError, match=match):
        gptq(w_OI, inverse_root(moment_II), INT4.nearest, peak, block)


def test_corrected_map_is_the_least_squares_solution_over_both_inputs():
    made = torch.Generator().manual_seed(0)
    x_NI, w_OI = torch.randn(500, 8, generator=made), torch.randn(3, 8, generator=made)
    z_NI = x_NI + 0.3 * torch.randn(500, 8, generator=made)
    r_NO, s_NO = torch.randn(500, 3, generator=made), torch.randn(500, 3, generator=made)
    moment, drift = z_NI.T @ z_NI / 500, (x_NI - z_NI).T @ z_NI / 500
    residual = (r_NO - s_NO).T @ z_NI / 500
    found = corrected(w_OI, inverse_root(moment, 0.0), drift, residual, strength=1.0)
    expected = torch.linalg.lstsq(z_NI, x_NI @ w_OI.T + r_NO - s_NO).solution.T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_corrected_map_never_is_further_from_the_dense_outputs_in_a_hundred_cases():
    for seed in range(100):
        made = torch.Generator().manual_seed(seed)
        scale_I = torch.logspace(0, -(seed % 10) / 2, 16)
        x_NI, w_OI = torch.randn(64, 16, generator=made) * scale_I, torch.randn(4, 16, generator=made)
        z_NI = x_NI + (seed % 7) / 7 * torch.randn(64, 16, generator=made) * scale_I
        moment, drift = z_NI.T @ z_NI / 64, (x_NI - z_NI).T @ z_NI / 64
        new_OI = corrected(w_OI, inverse_root(moment), drift)
        missed = [(x_NI @ w_OI.T - z_NI @ one.T).square().sum() for one in (new_OI, w_OI)]
        assert missed[0] <= missed[1] * (1 + 1e-5)


def test_corrected_map_without_drift_is_the_map():
    w_OI, moment_II = case(0)
    assert torch.equal(corrected(w_OI, inverse_root(moment_II), torch.zeros_like(moment_II)), w_OI)


def test_corrected_map_of_a_nan_moment_is_refused():
    w_OI, moment_II = case(0)
    with pytest.raises(ValueError, match="not finite"):
        inverse_root(torch.full_like(moment_II, torch.inf))
    with pytest.raises(ValueError, match="not finite"):
        corrected(w_OI, inverse_root(moment_II), torch.full_like(moment_II, torch.nan))


def halves(noise, drift, seed=0, tokens=400):
    """Moments of two halves whose inputs differ by a constant map and by noise."""
    made = torch.Generator().manual_seed(seed)
    away_II = drift * torch.randn(16, 16, generator=made) / 4
    moments, drifts = [], []
    for _ in range(2):
        z_NI = torch.randn(tokens, 16, generator=made)
        x_NI = z_NI + z_NI @ away_II + noise * torch.randn(tokens, 16, generator=made)
        moments.append(z_NI.T @ z_NI)
        drifts.append((x_NI - z_NI).T @ z_NI)
    return torch.randn(4, 16, generator=made), moments, drifts, [None, None]


def test_agreement_is_full_where_both_halves_drift_alike_and_none_where_it_is_noise():
    assert agreement(*halves(noise=0.0, drift=0.3)) > 0.95
    assert agreement(*halves(noise=0.1, drift=0.3)) > 0.9
    assert sorted(agreement(*halves(noise=0.3, drift=0.0, seed=seed)) for seed in range(9))[4] < 0.3


def test_agreement_is_the_best_strength_by_brute_force_on_the_other_half():
    w_OI, moments, drifts, none = halves(noise=1.0, drift=0.3, tokens=60)
    told = agreement(w_OI, moments, drifts, none)

    def error(strength):
        total = 0.0
        for fit, judge in ((0, 1), (1, 0)):
            step = corrected(w_OI, inverse_root(moments[fit]), drifts[fit], strength=strength) - w_OI
            total += float(((step @ moments[judge]) * step).sum() - 2 * ((w_OI @ drifts[judge]) * step).sum())
        return total

    best = min((error(s / 200), s / 200) for s in range(201))[1]
    assert told == pytest.approx(best, abs=0.02)
    assert 0.02 < told < 0.98


def test_agreement_of_moments_that_cannot_be_factored_is_none():
    w_OI, moments, drifts, none = halves(noise=0.0, drift=0.3)
    assert agreement(w_OI, [-one for one in moments], drifts, none) == 0.0


@pytest.mark.parametrize("block", [None, 8])
def test_gptq_leaves_zeros_that_have_to_stay_and_loses_less_than_rounding_alone(block):
    w_OI, moment_II = case(4, outputs=16, inputs=64, tokens=200, spread=1.0)
    stands_OI = torch.rand(w_OI.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    w_OI = w_OI * stands_OI
    v_OI, scale_OG = gptq(w_OI, inverse_root(moment_II), INT4.nearest, peak, block, stands_OI)
    free_OI, _ = gptq(w_OI, inverse_root(moment_II), INT4.nearest, peak, block)
    assert not v_OI[~stands_OI].any() and free_OI[~stands_OI].any()
    plain_OI = INT4.nearest(w_OI / scale_OG.repeat_interleave(block or 64, dim=1))
    lost = [error(w_OI, spread_out(one, scale_OG), moment_II) for one in (v_OI, plain_OI)]
    assert lost[0] < 0.8 * lost[1]
