"""Measures of classes, from the documents of items; see `stages.measures.item_scores`.

Shapes: R resamples, D items, C classes, B bins.
"""

from __future__ import annotations

import numpy as np

from stages.measures.item_scores import Columns, Floats

BINS = 10


def precision(ours: Columns, weights_RD: Floats) -> Floats:
    """Of the items that are given a class the share that are of it, the mean over classes (macro)."""
    right_RC, found_RC, _ = _counts(ours, weights_RD)
    return _mean(_share(right_RC, found_RC), _present(ours, weights_RD))


def recall(ours: Columns, weights_RD: Floats) -> Floats:
    """Of the items of a class the share that are given it, the mean over classes (macro)."""
    right_RC, _, there_RC = _counts(ours, weights_RD)
    return _mean(_share(right_RC, there_RC), _present(ours, weights_RD))


def f1(ours: Columns, weights_RD: Floats) -> Floats:
    """The harmonic mean of a class's precision and recall, the mean over classes (macro)."""
    right_RC, found_RC, there_RC = _counts(ours, weights_RD)
    return _mean(_share(2 * right_RC, found_RC + there_RC), _present(ours, weights_RD))


def calibration_error(ours: Columns, weights_RD: Floats) -> Floats:
    """How far the model's confidence is from its share of right answers, over ten bins of equal width.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    bin_D = np.minimum((ours["confidence"] * BINS).astype(int), BINS - 1)
    in_DB = (bin_D[:, None] == np.arange(BINS)).astype(np.float64)
    gap_RB = weights_RD @ (in_DB * (ours["right"] - ours["confidence"])[:, None])
    found: Floats = np.abs(gap_RB).sum(-1) / weights_RD.sum(-1)
    return found


def _counts(ours: Columns, weights_RD: Floats) -> tuple[Floats, Floats, Floats]:
    """Items that are given their own class, that are given each, and that are of each."""
    classes = np.union1d(ours["expected"], ours["answer"])
    of_DC, given_DC = (ours[key][:, None] == classes for key in ("expected", "answer"))
    right_RC, found_RC, there_RC = (weights_RD @ one.astype(np.float64) for one in (of_DC & given_DC, given_DC, of_DC))
    return right_RC, found_RC, there_RC


def _present(ours: Columns, weights_RD: Floats) -> Floats:
    _, found_RC, there_RC = _counts(ours, weights_RD)
    present: Floats = (found_RC + there_RC > 0).astype(np.float64)
    return present


def _share(part_RC: Floats, whole_RC: Floats) -> Floats:
    """Nothing of nothing counts as nothing."""
    found: Floats = np.divide(part_RC, whole_RC, out=np.zeros_like(part_RC), where=whole_RC > 0)
    return found


def _mean(share_RC: Floats, present_RC: Floats) -> Floats:
    found: Floats = (share_RC * present_RC).sum(-1) / present_RC.sum(-1)
    return found
