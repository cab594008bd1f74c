"""What `bench` measures, and how sure a figure of several rounds is: quantiles, and medians of ratios, with intervals.

Figures and their ratios are bootstrapped over rounds, which are few: the interval is as wide as the rounds differ.

Shapes: D rounds, K values, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stages.measures.interval import Floats, Interval, resampled

_WRITES = frozenset({"generate", "translate"})
_READS = frozenset({"fill", "classify", "score", "tag", "answer", "embed"})
SPEED = "speed"
"""The key of a report that is of speed."""
_METHOD: Literal["averaged_inverted_cdf"] = "averaged_inverted_cdf"


@dataclass(frozen=True)
class Speed:
    """What `bench` measures of an artifact.

    Attributes:
        title: its heading.
        tasks: what the models are for that it says something of.
        faster: whether more of it is better.
        once: it is seen once, and has no interval.
    """

    title: str
    tasks: frozenset[str] = _WRITES
    faster: bool = False
    once: bool = False


SPEEDS: Mapping[str, Speed] = {
    "decode_tokens_per_s": Speed("tokens/s written", faster=True),
    "prefill_tokens_per_s": Speed("tokens/s read", faster=True),
    "items_per_s": Speed("items/s", _READS, faster=True),
    "time_to_first_token_ms": Speed("first token, ms"),
    "token_latency_p50_ms": Speed("token p50, ms"),
    "token_latency_p95_ms": Speed("token p95, ms"),
    "token_latency_p99_ms": Speed("token p99, ms"),
    "load_s": Speed("load, s", _WRITES | _READS, once=True),
    "peak_rss_bytes": Speed("peak memory", _WRITES | _READS, once=True),
    "bandwidth_share": Speed("of copy bandwidth", frozenset({"generate"}), faster=True, once=True),
}


def foremost_speed(task: str) -> str:
    """The measure that stands for the speed of a model of this task: the first of the table that it has."""
    return next(name for name, one in SPEEDS.items() if task in one.tasks)


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
