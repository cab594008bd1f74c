"""How sure a mean over documents is: 95% bootstrap intervals, paired where two models are compared.

Shapes: D documents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES, SEED, CHUNK = 10_000, 20_111, 1_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A point estimate and the ends of its 95% interval."""

    point: float
    low: float
    high: float


def bootstrap(
    tokens_D: Floats, ours_D: Floats, theirs_D: Floats | None = None, *, exponential: bool = False
) -> Interval:
    """The token-weighted mean of a score, or its ratio to another's on the same documents, with a 95% interval.

    Args:
        tokens_D: predicted tokens of each document.
        ours_D: sums of the score over each document.
        theirs_D: the other's sums; None for the mean itself.
        exponential: take the mean's exponential; the ratio is then the exponential of the means' difference.

    Returns:
        The point and the interval's ends. With a single document the interval is the whole line; a score that is not
        finite makes all three NaN.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13; the quantiles are widened for few
    documents as in Hesterberg, What Teachers Should Know About the Bootstrap, 2015, sec. 5.3 (expanded percentile).
    """
    documents = len(tokens_D)
    if not documents or not all(
        np.isfinite(x).all() for x in (tokens_D, ours_D, *([] if theirs_D is None else [theirs_D]))
    ):
        return Interval(math.nan, math.nan, math.nan)

    def statistic(weights_RD: Floats) -> Floats:
        total_R = weights_RD @ tokens_D
        mean_R = weights_RD @ ours_D / total_R
        other_R = None if theirs_D is None else weights_RD @ theirs_D / total_R
        if exponential:
            return np.exp(mean_R if other_R is None else mean_R - other_R)
        return mean_R if other_R is None else mean_R / other_R

    return resampled(np.ones(documents), statistic)


def resampled(counts_D: Floats, statistic: Callable[[Floats], Floats]) -> Interval:
    """A statistic of documents with a 95% interval.

    Args:
        counts_D: how many documents are alike, 1 for each where none are. To draw kinds of documents by how many there
            are is to draw documents, and far faster.
        statistic: weights_RD, how often each kind is drawn in each resample, to value_R. NaN where a resample has no
            value: it is left out.

    Returns:
        The value of the documents as they are and the interval's ends, as `bootstrap` gives them.
    """
    with np.errstate(all="ignore"):
        documents, point = int(counts_D.sum()), float(statistic(counts_D[None])[0])
        if documents == 1:
            return Interval(point, -math.inf, math.inf)
        generator = np.random.default_rng(SEED)
        draws = [
            statistic(generator.multinomial(documents, counts_D / documents, size=CHUNK).astype(np.float64))
            for _ in range(RESAMPLES // CHUNK)
        ]
        tail = _expanded_tail(documents)
        found = np.concatenate(draws)
        found = found[~np.isnan(found)]
        if math.isnan(point) or not len(found):
            return Interval(math.nan, math.nan, math.nan)
        low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(point, float(low), float(high))


def _expanded_tail(documents: int) -> float:
    """The tail probability whose normal quantile equals Student's times sqrt(D / (D - 1)): few documents, wide tails.

    The t quantile is Fisher and Cornish's expansion, within 2% from 5 documents on.
    """
    normal, freedom = NormalDist(), documents - 1
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-t * math.sqrt(documents / freedom))
