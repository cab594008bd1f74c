"""Ranks, held against scipy's on the items that are drawn."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from stages.measures import ranking
from stages.measures.interval import Interval
from stages.measures.item_scores import columns
from stages.measures.paired import above_chance, of_documents
from stages.measures.table import MEASURES


def pairs(seed, items=50, noise=1.0):
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 6, items)  # people give few different scores: ties
    near = np.round(gold + noise * rng.normal(0, 1, items), 1)
    return [{"gold": float(a), "similarity": float(b), "tokens": 3} for a, b in zip(gold, near, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_correlation_equals_scipys_in_every_resample(seed):
    given = pairs(seed)
    weights = np.random.default_rng(seed + 9).multinomial(50, [1 / 50] * 50, size=8)
    found = ranking.spearman(columns(given), weights.astype(float))
    for row, value in zip(weights, found, strict=True):
        drawn = [one for one, times in zip(given, row, strict=True) for _ in range(times)]
        theirs = spearmanr([one["gold"] for one in drawn], [one["similarity"] for one in drawn]).statistic
        assert value == pytest.approx(theirs, abs=1e-12)


def test_correlation_of_what_is_all_alike_is_no_number_and_fails():
    same = [one | {"similarity": 0.5} for one in pairs(0)]
    assert np.isnan(ranking.spearman(columns(same), np.ones((1, 50)))[0])
    assert np.isnan(of_documents(MEASURES["spearman"], same, None).point)


def test_interval_is_scipys_over_the_same_kind_of_draws():
    given = pairs(1, items=80)
    rng = np.random.default_rng(0)
    theirs = []
    for _ in range(2000):
        drawn = [given[at] for at in rng.integers(0, 80, 80)]
        theirs.append(spearmanr([one["gold"] for one in drawn], [one["similarity"] for one in drawn]).statistic)
    found = of_documents(MEASURES["spearman"], given, None)
    assert isinstance(found, Interval)
    low, high = np.quantile(theirs, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_baseline_that_finds_near_what_people_do_knows_something():
    assert above_chance(pairs(2)) and not above_chance(pairs(2, noise=1000.0))


def test_recall_counts_queries_whose_document_is_near_enough():
    given = columns([{"rank": rank} for rank in (1, 1, 2, 5, 6, 10, 11, 400)])
    weights = np.ones((1, 8))
    assert [float(getattr(ranking, f"recall_at_{k}")(given, weights)[0]) for k in (1, 5, 10)] == [2 / 8, 4 / 8, 6 / 8]
    weights[0, 0] = 3
    assert ranking.recall_at_1(given, weights)[0] == 4 / 10
