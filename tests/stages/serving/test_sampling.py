"""The distribution that tokens are drawn from, against transformers' own processors, and what is drawn from it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.runtime.contract import StageError
from stages.serving.generation import Generation
from stages.serving.sampling import Drawing, penalized, probabilities

HOW = [
    {},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 1.8, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.2},
]


def transformers_own(logits_V, seen, how):
    chain = LogitsProcessorList()
    if how.repetition_penalty is not None:
        chain.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    chain.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        chain.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        chain.append(TopPLogitsWarper(how.top_p))
    return chain(torch.tensor([seen]), torch.from_numpy(logits_V)[None])[0].double().softmax(-1).numpy()


@pytest.mark.parametrize("asked", HOW)
@pytest.mark.parametrize("seed", range(3))
def test_distribution_is_the_one_of_transformers_processors(asked, seed):
    draw = np.random.default_rng(seed)
    logits_V, seen = (4 * draw.standard_normal(700)).astype(np.float32), draw.integers(0, 700, 30).tolist()
    how = Generation(**{"temperature": 1.0} | asked)
    before = logits_V.copy()
    found_V, wanted_V = probabilities(logits_V, seen, how), transformers_own(logits_V, seen, how)
    assert ((found_V > 0) == (wanted_V > 0)).all()
    np.testing.assert_allclose(found_V, wanted_V, rtol=2e-5)
    assert (logits_V == before).all()


def test_equal_logits_at_the_edge_of_top_k_all_stay_as_in_transformers():
    logits_V, how = np.array([3, 2, 2, 2, 1], np.float32), Generation(temperature=1.0, top_k=2)
    found_V = probabilities(logits_V, [0], how)
    assert (found_V > 0).tolist() == [True, True, True, True, False]
    np.testing.assert_allclose(found_V, transformers_own(logits_V, [0], how), rtol=1e-6)


def test_penalty_counts_a_token_once_and_turns_with_its_sign():
    logits_V = np.array([2, -2, 3, 0], np.float32)
    assert penalized(logits_V, [0, 0, 1, 99], 2.0).tolist() == [1, -4, 3, 0]
    assert penalized(logits_V, [0, 1], 1.0) is logits_V
    how = Generation(repetition_penalty=2.0)
    assert Drawing(how, 1)(0, [2], logits_V) == 0 and Drawing(how, 1)(0, [0], logits_V) == 2


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(1e-9, 1e3),
    st.integers(0, 50),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 2**40),
)
def test_whatever_is_asked_a_token_is_drawn_that_has_a_probability(logits, temperature, top_k, top_p, seed):
    logits_V = np.array(logits, np.float32)
    how = Generation(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    found_V = probabilities(logits_V, [0], how)
    assert found_V.sum() == pytest.approx(1) and found_V[logits_V == logits_V.max()].max() > 0
    assert found_V[Drawing(how, 1)(0, [0], logits_V)] > 0


def test_likeliest_token_stays_where_probabilities_cannot_tell_it_from_the_next():
    logits_V = np.array([8.8e-24, 0, 8.8e-25], np.float32)
    assert (probabilities(logits_V, [0], Generation(temperature=1.0, top_p=0.3)) > 0).tolist() == [True, False, False]


@pytest.mark.parametrize("top_p", [5e-324, 1e-17, 0.1, 0.999, 1.0])
def test_equal_logits_leave_at_least_one_token(top_p):
    logits_V, how = np.zeros(49_152, np.float32), Generation(temperature=1.0, top_p=top_p)
    kept = (probabilities(logits_V, [0], how) > 0).sum()
    assert kept == pytest.approx(max(1, top_p * 49_152), abs=1)


def test_tokens_come_as_often_as_their_probability_says():
    logits_V, how = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), Generation(temperature=1.0, seed=5)
    choose = Drawing(how, 1)
    counts = np.bincount([choose(0, [0], logits_V) for _ in range(20_000)], minlength=4)
    # Chi-square with three degrees of freedom: above 16.3 once in a thousand.
    wanted = 20_000 * np.exp(logits_V)
    assert ((counts - wanted) ** 2 / wanted).sum() < 16.3


def test_each_row_draws_for_itself():
    logits_V, how = np.zeros(1000, np.float32), Generation(temperature=1.0, seed=11)
    beside, alone = Drawing(how, 3), Drawing(how, 1)
    mixed = [(beside(1, [0], logits_V), beside(0, [0], logits_V)) for _ in range(5)]
    assert [pair[0] for pair in mixed] == [pair[1] for pair in mixed] == [alone(0, [0], logits_V) for _ in range(5)]


def test_model_that_says_no_number_is_told_and_no_token_drawn():
    logits_V = np.array([1, np.nan, 2], np.float32)
    with pytest.raises(StageError, match="no number for a token; measured 1 of 3 logits are not finite"):
        Drawing(Generation(temperature=1.0), 1)(0, [0], logits_V)
    for penalty in (0.01, 100):
        how, logits_V = Generation(temperature=1.0, repetition_penalty=penalty), np.array([-1e30, 1e30, 3], np.float32)
        assert Drawing(how, 1)(0, [0, 1], logits_V) in (0, 1, 2)
