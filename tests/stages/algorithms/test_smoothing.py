import pytest
import torch

from stages.algorithms.rounding import fake_round, round_rows
from stages.algorithms.smoothing import Sample, factors, input_scale, search


def rows(w_OI):
    q_OI, scale_O = round_rows(w_OI)
    return q_OI * scale_O[:, None]


@pytest.fixture
def outliers():
    torch.manual_seed(0)
    x_NI = torch.randn(200, 32)
    x_NI[:, 5] *= 60
    return x_NI, torch.randn(16, 32)


def test_factors_match_the_published_formula_up_to_one_common_number():
    peak_I, weight_I = torch.tensor([10.0, 1.0, 0.1]), torch.tensor([0.5, 2.0, 1.0])
    expected = peak_I**0.7 / weight_I**0.3
    found = factors(peak_I, weight_I, 0.7)
    torch.testing.assert_close(found / found[0], expected / expected[0])
    torch.testing.assert_close(found.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_factors_of_strength_zero_change_nothing():
    assert torch.equal(factors(torch.tensor([9.0, 1.0]), torch.ones(2), 0.0), torch.ones(2))


def test_factors_of_unused_channels_are_one_and_finite():
    found = factors(torch.tensor([0.0, 5.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]), 0.5)
    assert found[0] == found[1] == 1
    assert torch.equal(factors(torch.zeros(2), torch.ones(2), 0.5), torch.ones(2))


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_factors_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        factors(torch.ones(2), torch.ones(2), strength)


def sampled(x_NI, peak_I=None, weight_N=None):
    peak_I = x_NI.abs().amax(0) if peak_I is None else peak_I
    return Sample(peak_I, x_NI, torch.ones(len(x_NI)) if weight_N is None else weight_N)


def test_search_with_an_outlier_channel_smooths_and_lowers_the_error(outliers):
    x_NI, w_OI = outliers
    peaks = x_NI.abs().amax(0), w_OI.abs().amax(0)
    candidates = [(strength, factors(*peaks, strength)) for strength in (0.0, 0.5, 0.8)]
    plain = search([w_OI], sampled(x_NI), candidates[:1], round_rows, ranges=())
    found = search([w_OI], sampled(x_NI), candidates, round_rows, ranges=())
    assert found.strength > 0
    assert found.error < plain.error / 5


def test_search_reports_the_error_that_rounding_really_makes(outliers):
    x_NI, w_OI = outliers
    factor_I = factors(x_NI.abs().amax(0), w_OI.abs().amax(0), 0.5)
    weight_N = torch.rand(len(x_NI))
    found = search([w_OI], sampled(x_NI, weight_N=weight_N), [(0.5, factor_I)], round_rows)
    exact_NO = x_NI.double() @ w_OI.double().t()
    scale = input_scale(x_NI.abs().amax(0), factor_I, found.reach)
    assert scale == pytest.approx(found.reach * float((x_NI / factor_I).abs().max()) / 127, rel=1e-5)
    rounded = fake_round(x_NI / factor_I, scale) @ rows(w_OI * factor_I).t()
    size_N = exact_NO.square().sum(1)
    ratio_N = (rounded - exact_NO).square().sum(1) / (size_N + size_N.median())
    assert found.error == pytest.approx(float((ratio_N * weight_N).sum() / weight_N.sum()), rel=1e-3)


def test_search_with_one_huge_value_narrows_the_range():
    torch.manual_seed(1)
    x_NI = torch.randn(400, 32)
    x_NI[7, 3] = 40.0
    w_OI = torch.randn(16, 32)
    w_OI[:, 3] = 0.01
    found = search([w_OI], sampled(x_NI), [(0.0, torch.ones(32))], round_rows)
    whole = search([w_OI], sampled(x_NI), [(0.0, torch.ones(32))], round_rows, ranges=())
    assert found.reach < 0.5
    assert found.error < whole.error / 2


def test_search_widens_a_range_that_unseen_rows_pass():
    torch.manual_seed(2)
    x_NI = torch.randn(400, 32)
    found = search(
        [torch.randn(16, 32)], sampled(x_NI, peak_I=torch.full((32,), 1.5)), [(0.0, torch.ones(32))], round_rows
    )
    assert found.reach > 1
