"""Classes, held against scikit-learn's own figures on the same predictions."""

import numpy as np
import pytest
from sklearn import metrics

from stages.measures import classification
from stages.measures.item_scores import accuracy, columns


def documents(seed, items=60, classes=("cat", "dog", "bird", "猫")):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(items):
        expected = str(rng.choice(classes[:-1]))
        answer = expected if rng.random() < 0.6 else str(rng.choice(classes))
        right = int(expected == answer)
        found.append({"expected": expected, "answer": answer, "right": right, "confidence": rng.uniform(0.2, 1)})
    return found


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learns_in_every_resample(seed):
    given = documents(seed)
    weights = np.random.default_rng(seed + 100).multinomial(len(given), [1 / len(given)] * len(given), size=8)
    ours = columns(given)
    for row in weights:
        drawn = [one for one, times in zip(given, row, strict=True) for _ in range(times)]
        true, found = ([one[key] for one in drawn] for key in ("expected", "answer"))
        each = row[None].astype(float)
        for name, theirs in (
            ("precision", metrics.precision_score),
            ("recall", metrics.recall_score),
            ("f1", metrics.f1_score),
        ):
            wanted = theirs(true, found, average="macro", zero_division=0)
            assert getattr(classification, name)(ours, each)[0] == pytest.approx(wanted), name
        assert accuracy(ours, each)[0] == pytest.approx(metrics.accuracy_score(true, found))
    whole = classification.f1(ours, weights.astype(float))
    assert len(whole) == 8 and np.isfinite(whole).all()


def test_calibration_error_is_the_gap_between_confidence_and_right_answers_by_bins():
    given = documents(3, items=200)
    confidence, right = (np.array([one[key] for one in given]) for key in ("confidence", "right"))
    total = 0.0
    for low in np.arange(0, 1, 0.1):
        inside = (confidence >= low) & (confidence < low + 0.1)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert classification.calibration_error(columns(given), np.ones((1, 200)))[0] == pytest.approx(total)


def test_model_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    sure = [{"right": int(n < 15), "confidence": 0.75} for n in range(20)]
    assert classification.calibration_error(columns(sure), np.ones((1, 20)))[0] == pytest.approx(0)
    certain = [{"right": 0, "confidence": 1.0}]
    assert classification.calibration_error(columns(certain), np.ones((1, 1)))[0] == 1
