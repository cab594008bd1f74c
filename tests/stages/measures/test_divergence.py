import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from stages.measures.divergence import kl_divergence, kl_of_labels, top1_agreement


def drawn(rows, vocabulary, seed, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, vocabulary, generator=generator) * scale for _ in range(2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(2, 40), st.integers(0, 10_000))
def test_kl_of_any_logits_equals_scipys_relative_entropy(rows, vocabulary, seed):
    baseline_TV, model_TV = drawn(rows, vocabulary, seed)
    p_TV, q_TV = softmax(baseline_TV.double().numpy(), 1), softmax(model_TV.double().numpy(), 1)
    found_T = kl_divergence(baseline_TV, model_TV).numpy()
    np.testing.assert_allclose(found_T, rel_entr(p_TV, q_TV).sum(1), rtol=1e-6, atol=1e-6)
    assert (found_T >= 0).all()


def test_kl_is_the_baselines_expectation_and_not_the_models():
    baseline_TV, model_TV = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert float(kl_divergence(baseline_TV, model_TV)[0]) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    )


def test_kl_of_equal_or_shifted_logits_is_zero():
    logits_TV, _ = drawn(100, 30, 1)
    assert kl_divergence(logits_TV, logits_TV.clone()).tolist() == [0.0] * 100
    assert float(kl_divergence(logits_TV, logits_TV + 2).max()) < 1e-6


def test_kl_of_labels_is_that_of_torchs_distributions_and_sees_what_is_added_to_all():
    baseline_RC, model_RC = drawn(60, 7, 2)
    said = [torch.distributions.Bernoulli(logits=one.double()) for one in (baseline_RC, model_RC)]
    wanted_R = torch.distributions.kl_divergence(*said).sum(-1)
    torch.testing.assert_close(kl_of_labels(baseline_RC, model_RC), wanted_R, rtol=1e-6, atol=1e-6)
    assert float(kl_of_labels(baseline_RC, baseline_RC + 2).min()) > 0.01


def test_kl_over_a_large_vocabulary_loses_nothing_to_float32():
    baseline_TV, noise_TV = drawn(130, 49_152, 5)
    model_TV = baseline_TV + 0.02 * noise_TV
    p_TV, q_TV = softmax(baseline_TV.double().numpy(), 1), softmax(model_TV.double().numpy(), 1)
    found_T = kl_divergence(baseline_TV, model_TV).numpy()
    np.testing.assert_allclose(found_T, rel_entr(p_TV, q_TV).sum(1), atol=3e-7)
    assert found_T.mean() > 1e-3


def test_kl_of_impossible_tokens_is_zero_infinite_or_nan_as_it_should():
    never, nan = -math.inf, math.nan
    baseline_TV = torch.tensor([[0.0, never, 0.0], [0.0, 0.0, 0.0], [nan, 0.0, 0.0]])
    model_TV = torch.tensor([[0.0, never, 0.0], [0.0, never, 0.0], [0.0, 0.0, 0.0]])
    kl = kl_divergence(baseline_TV, model_TV).tolist()
    assert kl[:2] == [0.0, math.inf]
    assert math.isnan(kl[2])


def test_agreement_counts_equal_likeliest_tokens():
    baseline_TV, model_TV = drawn(200, 5, 3)
    expected = np.argmax(baseline_TV.numpy(), 1) == np.argmax(model_TV.numpy(), 1)
    assert top1_agreement(baseline_TV, model_TV).tolist() == expected.tolist()
    assert 0 < expected.sum() < 200


@pytest.mark.parametrize("measure", [kl_divergence, top1_agreement])
def test_comparison_of_other_shapes_is_refused(measure):
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(torch.zeros(4), torch.zeros(4))
