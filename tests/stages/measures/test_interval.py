import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stages.measures.interval import Interval, _expanded_tail, bootstrap, resampled


def drawn(seed, documents, ratio=1.2):
    """Paired documents of unequal length: both models find the same ones hard, ours by log(ratio) more on average."""
    rng = np.random.default_rng(seed)
    tokens_D = rng.integers(50, 200, documents).astype(float)
    hard_D = rng.gamma(9.0, 0.35, documents)
    worse_D = rng.gamma(4.0, math.log(ratio) / 4.0, documents)
    return tokens_D, tokens_D * (hard_D + worse_D), tokens_D * hard_D


@pytest.mark.parametrize(("documents", "least"), [(8, 0.88), (24, 0.90)])
def test_interval_of_many_trials_contains_the_true_ratio_about_as_often_as_it_says(documents, least):
    inside = 0
    for seed in range(300):
        interval = bootstrap(*drawn(seed, documents), exponential=True)
        inside += interval.low <= 1.2 <= interval.high
    assert least <= inside / 300 <= 0.985


def test_point_equals_the_closed_forms():
    tokens_D, ours_D, theirs_D = drawn(5, 30)
    mean, other = ours_D.sum() / tokens_D.sum(), theirs_D.sum() / tokens_D.sum()
    assert bootstrap(tokens_D, ours_D).point == pytest.approx(mean)
    assert bootstrap(tokens_D, ours_D, exponential=True).point == pytest.approx(math.exp(mean))
    assert bootstrap(tokens_D, ours_D, theirs_D).point == pytest.approx(mean / other)
    assert bootstrap(tokens_D, ours_D, theirs_D, exponential=True).point == pytest.approx(math.exp(mean - other))


def test_ends_for_many_documents_equal_scipys_percentile_bootstrap():
    tokens_D, ours_D, theirs_D = drawn(2, 400)

    def ratio(tokens, ours, theirs, axis=-1):
        return np.exp((ours.sum(axis) - theirs.sum(axis)) / tokens.sum(axis))

    found = bootstrap(tokens_D, ours_D, theirs_D, exponential=True)
    expected = stats.bootstrap(
        (tokens_D, ours_D, theirs_D), ratio, paired=True, method="percentile", n_resamples=9999, batch=500,
        rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_pairing_makes_the_interval_far_narrower_than_two_unpaired_ones():
    tokens_D, ours_D, theirs_D = drawn(1, 40)
    paired = bootstrap(tokens_D, ours_D, theirs_D, exponential=True)
    alone, other = bootstrap(tokens_D, ours_D), bootstrap(tokens_D, theirs_D)
    assert math.log(paired.high / paired.low) < 0.5 * ((alone.high - alone.low) + (other.high - other.low))


@pytest.mark.parametrize("documents", [5, 10, 30, 1000])
def test_tail_widens_with_students_quantile_for_few_documents(documents):
    wanted = stats.t.ppf(0.975, documents - 1) * math.sqrt(documents / (documents - 1))
    assert -stats.norm.ppf(_expanded_tail(documents)) == pytest.approx(wanted, rel=0.02)


def test_equal_scores_give_the_ratio_one_without_doubt():
    tokens_D, ours_D, _ = drawn(3, 12)
    assert bootstrap(tokens_D, ours_D, ours_D, exponential=True) == Interval(1.0, 1.0, 1.0)


def test_one_document_says_nothing_about_others():
    tokens_D, ours_D, theirs_D = drawn(3, 1)
    interval = bootstrap(tokens_D, ours_D, theirs_D, exponential=True)
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert math.isfinite(interval.point)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_gives_no_number(bad):
    tokens_D, ours_D, theirs_D = drawn(3, 6)
    spoiled_D = ours_D.copy()
    spoiled_D[2] = bad
    for interval in (bootstrap(tokens_D, spoiled_D, theirs_D), bootstrap(tokens_D, ours_D, spoiled_D)):
        assert all(math.isnan(end) for end in (interval.point, interval.low, interval.high))


def test_no_documents_give_no_number():
    assert math.isnan(bootstrap(np.empty(0), np.empty(0)).point)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 25))
def test_interval_of_any_documents_contains_its_point_and_repeats_exactly(seed, documents):
    tokens_D, ours_D, theirs_D = drawn(seed, documents)
    interval = bootstrap(tokens_D, ours_D, theirs_D, exponential=True)
    assert interval.low <= interval.point <= interval.high
    assert bootstrap(tokens_D, ours_D, theirs_D, exponential=True) == interval


def test_interval_of_very_many_documents_is_that_of_the_normal_law_and_of_alike_ones_the_same():
    rng = np.random.default_rng(3)
    right_D = rng.integers(0, 2, 20_000).astype(float)
    counts_D = np.ones(len(right_D))

    def share(weights_RD):
        return weights_RD @ right_D / weights_RD.sum(-1)

    found = resampled(counts_D, share)
    half = 1.96 * math.sqrt(right_D.var() / len(right_D))
    assert (found.low, found.high) == pytest.approx((found.point - half, found.point + half), abs=0.05 * half)
    twice = resampled(np.append(counts_D[:-1], 2.0), share)  # a kind of two, drawn twice as often
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high), abs=0.05 * half)
