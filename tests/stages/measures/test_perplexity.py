import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from stages.measures.perplexity import ROWS, negative_log_likelihood, perplexity


def drawn(rows, vocabulary, seed=0, scale=5.0):
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(rows, vocabulary, generator=generator) * scale
    return logits_TV, torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5])
def test_nll_over_many_rows_equals_sklearns_log_loss(rows):
    logits_TV, targets_T = drawn(rows, 11)
    probabilities = np.exp(logits_TV.double().numpy() - np.logaddexp.reduce(logits_TV.double().numpy(), 1)[:, None])
    expected = log_loss(targets_T.numpy(), probabilities, labels=list(range(11)), normalize=False)
    assert float(negative_log_likelihood(logits_TV, targets_T).sum()) == pytest.approx(expected, rel=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(2, 40), st.integers(0, 10_000), st.floats(0.01, 200))
def test_nll_of_any_logits_equals_torchs_cross_entropy(rows, vocabulary, seed, scale):
    logits_TV, targets_T = drawn(rows, vocabulary, seed, scale)
    expected_T = cross_entropy(logits_TV.double(), targets_T, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logits_TV, targets_T), expected_T, rtol=1e-6, atol=1e-6)


def test_nll_of_huge_logits_stays_exact():
    logits_TV = torch.tensor([[3e38, 0.0], [-3e38, -3e38]])
    nll_T = negative_log_likelihood(logits_TV, torch.tensor([0, 1]))
    assert nll_T.tolist() == [0.0, pytest.approx(math.log(2))]


def test_nll_of_nan_logits_is_nan():
    logits_TV = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    assert negative_log_likelihood(logits_TV, torch.tensor([0, 0])).isnan().tolist() == [True, False]


def test_nll_of_a_models_window_equals_transformers_own_loss():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids_NT = torch.randint(0, 50, (1, 80))
    with torch.no_grad():
        out = model(input_ids=ids_NT, labels=ids_NT)
    nll_T = negative_log_likelihood(out.logits[0, :-1], ids_NT[0, 1:])
    assert float(nll_T.mean()) == pytest.approx(float(out.loss), rel=1e-6)
    assert perplexity([float(nll_T.sum())], [79]) == pytest.approx(math.exp(float(out.loss)), rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (2, 4)])
def test_nll_of_shapes_that_do_not_belong_together_is_refused(shape):
    with pytest.raises(ValueError, match="do not predict"):
        negative_log_likelihood(torch.zeros(shape), torch.zeros(3, dtype=torch.int64))


def test_perplexity_weights_documents_by_their_tokens():
    assert perplexity([10 * math.log(2), 30 * math.log(4)], [10, 30]) == pytest.approx(2 ** (1 * 0.25 + 2 * 0.75))


def test_perplexity_of_uniform_guessing_is_the_vocabulary():
    nll_T = negative_log_likelihood(torch.zeros(70, 768), torch.arange(70))
    assert perplexity([float(nll_T.sum())], [70]) == pytest.approx(768)


def test_perplexity_beyond_float64_is_infinite():
    assert perplexity([1e6], [1]) == math.inf


def test_perplexity_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        perplexity([], [])


def test_nll_over_a_large_vocabulary_loses_nothing_to_float32():
    logits_TV, targets_T = drawn(130, 49_152, scale=0.5)
    expected_T = cross_entropy(logits_TV.double(), targets_T, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logits_TV, targets_T), expected_T, rtol=3e-7, atol=0)
