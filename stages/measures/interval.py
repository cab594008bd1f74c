"""How sure a mean over documents is: 95% bootstrap intervals, paired where two models are compared.

Figures of several rounds are quantiles, and medians of ratios, bootstrapped over rounds, which are few: the interval is
as wide as the rounds differ.

Shapes: D documents or rounds, K values, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES, SEED, CHUNK = 10_000, 20_111, 1_000
_AT_ONCE = 4_000_000
"""So many counts are drawn at once: of 100,000 documents a thousand resamples would take several GB."""
_MANY = 2_000
"""From so many kinds of documents on documents are drawn one by one, which takes a tenth of the time then."""
CONFIDENCE = 0.95
_METHOD: Literal["averaged_inverted_cdf"] = "averaged_inverted_cdf"


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
        size = max(1, min(CHUNK, _AT_ONCE // len(counts_D)))
        draws = [
            statistic(_drawn(generator, counts_D, documents, min(size, RESAMPLES - start)))
            for start in range(0, RESAMPLES, size)
        ]
        tail = _expanded_tail(documents)
        found = np.concatenate(draws)
        found = found[~np.isnan(found)]
        if math.isnan(point) or not len(found):
            return Interval(math.nan, math.nan, math.nan)
        low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(point, float(low), float(high))


def _drawn(generator: np.random.Generator, counts_D: Floats, documents: int, size: int) -> Floats:
    """How often each kind is drawn in each of so many resamples."""
    kinds = len(counts_D)
    if kinds < _MANY:
        return generator.multinomial(documents, counts_D / documents, size=size).astype(np.float64)
    kind_D = np.repeat(np.arange(kinds), counts_D.astype(np.int64))
    weights_RD = np.empty((size, kinds))
    for weights_D in weights_RD:
        weights_D[:] = np.bincount(kind_D[generator.integers(documents, size=documents)], minlength=kinds)
    return weights_RD


def _expanded_tail(documents: int) -> float:
    """The tail probability whose normal quantile equals Student's times sqrt(D / (D - 1)): few documents, wide tails.

    The t quantile is Fisher and Cornish's expansion, within 2% from 5 documents on.
    """
    normal, freedom = NormalDist(), documents - 1
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-t * math.sqrt(documents / freedom))


def of_rounds(rounds: Sequence[Sequence[float]], quantile: float = 0.5) -> Interval:
    """A quantile of all values of all rounds.

    Args:
        rounds: the values of each.
        quantile: the value that so much of the whole does not exceed; the mean of two neighbours where both are it.
    """
    values_K = np.array([one for some in rounds for one in some], dtype=np.float64)
    round_K = np.repeat(np.arange(len(rounds)), [len(some) for some in rounds])
    order_K = values_K.argsort(kind="stable")
    sorted_K, round_K = values_K[order_K], round_K[order_K]

    def statistic(weights_RD: Floats) -> Floats:
        reached_RK = weights_RD[:, round_K].cumsum(1)
        wanted_R1 = reached_RK[:, -1:] * quantile
        # A trillionth either way: 0.95 times 20 must not be more than the 19 values that it is.
        at_R, behind_R = ((reached_RK >= wanted_R1 * near).argmax(1) for near in (1 - 1e-12, 1 + 1e-12))
        found_R: Floats = (sorted_K[at_R] + sorted_K[behind_R]) / 2
        return found_R

    return resampled(np.ones(len(rounds)), statistic)


def of_ratios(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], quantile: float = 0.5) -> Interval:
    """The median over rounds of the ratio of a quantile to another's in the same round."""
    pairs = zip(ours, theirs, strict=True)
    return of_rounds([[_quantile(mine, quantile) / _quantile(other, quantile)] for mine, other in pairs])


def _quantile(values: Sequence[float], quantile: float) -> float:
    return float(np.quantile(values, quantile, method=_METHOD))
