"""Entities, held against seqeval's own figures on the same tags."""

import numpy as np
import pytest
from seqeval import metrics

from stages.measures import entities
from stages.measures.item_scores import columns

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-地名", "I-地名")


def pairs(seed, items=30):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(items):
        true = [str(rng.choice(TAGS)) for _ in range(rng.integers(1, 9))]
        found.append((true, [one if rng.random() < 0.7 else str(rng.choice(TAGS)) for one in true]))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_seqevals_in_every_resample(seed):
    given = pairs(seed)
    ours = columns([entities.counted(*pair, entities=True) for pair in given])
    weights = np.random.default_rng(seed + 50).multinomial(len(given), [1 / len(given)] * len(given), size=6)
    for row in (*weights, np.ones(len(given), dtype=int)):
        drawn = [pair for pair, times in zip(given, row, strict=True) for _ in range(times)]
        true, found = ([pair[side] for pair in drawn] for side in (0, 1))
        each = row[None].astype(float)
        assert entities.entity_precision(ours, each)[0] == pytest.approx(metrics.precision_score(true, found))
        assert entities.entity_recall(ours, each)[0] == pytest.approx(metrics.recall_score(true, found))
        assert entities.entity_f1(ours, each)[0] == pytest.approx(metrics.f1_score(true, found))
        assert entities.tag_accuracy(ours, each)[0] == pytest.approx(metrics.accuracy_score(true, found))
    assert len(entities.entity_f1(ours, weights.astype(float))) == 6


def test_model_that_finds_no_entity_has_none_of_their_f1():
    ours = columns([entities.counted(["B-PER", "O"], ["O", "O"], entities=True)])
    assert [one(ours, np.ones((1, 1)))[0] for one in (entities.entity_precision, entities.entity_f1)] == [0, 0]
    assert entities.tag_accuracy(ours, np.ones((1, 1)))[0] == 0.5


def test_parts_of_speech_are_no_entities():
    assert entities.of_entities(TAGS)
    assert not entities.of_entities(["NOUN", "O"])
    assert not entities.of_entities(["B-"])
    assert entities.counted(["NOUN", "VERB"], ["NOUN", "NOUN"], entities=False) == {"tags": [1, 2]}
