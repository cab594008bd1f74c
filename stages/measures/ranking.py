"""Measures of vectors of texts, from the documents of items; see `stages.measures.item_scores`.

Shapes: R resamples, D items.
"""

from __future__ import annotations

import numpy as np

from stages.measures.item_scores import Columns, Floats


def spearman(ours: Columns, weights_RD: Floats) -> Floats:
    """Spearman's rank correlation of the cosine between two texts and the score that people gave them.

    NaN where all cosines are one, or all scores.

    Source: Spearman, The Proof and Measurement of Association between Two Things, 1904; ties have their mean rank.
    """
    a_RD, b_RD = (_centered(ours[key].astype(np.float64), weights_RD) for key in ("similarity", "gold"))
    both_R, a_R, b_R = ((weights_RD * product).sum(-1) for product in (a_RD * b_RD, a_RD**2, b_RD**2))
    found: Floats = np.divide(both_R, np.sqrt(a_R * b_R), out=np.full_like(both_R, np.nan), where=a_R * b_R > 0)
    return found


def recall_at_1(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of queries whose document is the nearest one."""
    return _within(ours, weights_RD, 1)


def recall_at_5(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of queries whose document is one of the five nearest."""
    return _within(ours, weights_RD, 5)


def recall_at_10(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of queries whose document is one of the ten nearest."""
    return _within(ours, weights_RD, 10)


def _within(ours: Columns, weights_RD: Floats, most: int) -> Floats:
    found: Floats = weights_RD @ (ours["rank"] <= most).astype(np.float64) / weights_RD.sum(-1)
    return found


def _centered(values_D: Floats, weights_RD: Floats) -> Floats:
    """The rank of each item among those that are drawn, ties at their mean, less the mean rank."""
    _, first_K, kind_D = np.unique(np.sort(values_D), return_index=True, return_inverse=True)
    order_D = values_D.argsort()
    drawn_RK = np.add.reduceat(weights_RD[:, order_D], first_K, axis=-1)
    kind_D = kind_D[order_D.argsort()]
    rank_RK = np.cumsum(drawn_RK, axis=-1) - (drawn_RK - 1) / 2
    rank_RD: Floats = rank_RK[:, kind_D] - (weights_RD.sum(-1, keepdims=True) + 1) / 2
    return rank_RD
