"""Times of many rounds become figures with intervals, and ratios to the baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.measures.interval import Interval, of_ratios, of_rounds
from stages.measures.table import SPEEDS

_QUANTILES = {"token_latency_p50_ms": 0.5, "token_latency_p95_ms": 0.95, "token_latency_p99_ms": 0.99}


@dataclass
class Cell:
    """One batch of prompts of one length, and what it took in each round.

    Attributes:
        rounds: role -> what its process said, round by round.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prompts: Sequence[Sequence[int]]
    rounds: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    def values(self, role: str) -> dict[str, list[list[float]]]:
        """Measure -> its values in each round."""
        rounds = self.rounds[role]
        first = [float(one["first_s"]) for one in rounds]
        if not rounds[0]["steps_s"]:
            return {"items_per_s": [[self.batch / one] for one in first]}
        steps = [list(map(float, one["steps_s"])) for one in rounds]
        latencies = [[1000 * one for one in some] for some in steps]
        return {
            "decode_tokens_per_s": [[self.batch * len(some) / sum(some)] for some in steps],
            "prefill_tokens_per_s": [[self.batch * self.prompt_tokens / one] for one in first],
            "time_to_first_token_ms": [[1000 * one] for one in first],
            **dict.fromkeys(_QUANTILES, latencies),
        }

    def described(self) -> dict[str, Any]:
        """As report.json says it."""
        found: dict[str, Any] = {
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }
        for role in self.rounds:
            figures = {name: of_rounds(some, _QUANTILES.get(name, 0.5)) for name, some in self.values(role).items()}
            found[role] = {
                "measures": {name: one.point for name, one in figures.items()},
                "intervals": {name: _ends(one) for name, one in figures.items()},
                "peak_rss_bytes": max(one["peak_rss_bytes"] for one in self.rounds[role]),
            }
        if "baseline" in self.rounds:
            ours, theirs = self.values("artifact"), self.values("baseline")
            found["ratios"] = {
                name: _three(of_ratios(ours[name], theirs[name], _QUANTILES.get(name, 0.5))) for name in ours
            }
        return found


def headline(
    cell: Cell, about: Mapping[str, Mapping[str, Any]], weights: Mapping[str, int], copy_bytes_per_s: float | None
) -> dict[str, Any]:
    """What the report says of one batch and of what was seen once.

    Args:
        cell: the batch.
        about: role -> what its process said when it was open.
        weights: role -> bytes of the weights that a token reads.
        copy_bytes_per_s: of this machine's memory; None where a model is executed elsewhere.
    """
    found = cell.described()
    for role in cell.rounds:
        said, measures = found[role], found[role]["measures"]
        measures["load_s"] = about[role]["load_s"]
        # The first round's: later ones follow larger batches.
        measures["peak_rss_bytes"] = float(cell.rounds[role][0]["peak_rss_bytes"])
        del said["peak_rss_bytes"]
        kept = cell.rounds[role][0]["kept_bytes"]
        if kept is not None and cell.batch == 1:
            # The cache as it stands on the way, halfway through the new tokens.
            written = cell.new_tokens - 1
            share = (cell.prompt_tokens + written / 2) / (cell.prompt_tokens + written)
            said["bytes_per_token"] = round(weights[role] + kept * share)
            if copy_bytes_per_s:
                read_per_s = said["bytes_per_token"] / measures["token_latency_p50_ms"] * 1000
                measures["bandwidth_share"] = read_per_s / copy_bytes_per_s
        said |= {name: about[role][name] for name in ("target", "threads")}
    if "baseline" in cell.rounds:
        ours, theirs = (found[role]["measures"] for role in ("artifact", "baseline"))
        for name in (name for name, one in SPEEDS.items() if one.once and name in ours and name in theirs):
            found["ratios"][name] = _three(_once(ours[name] / theirs[name]))
    return found


def _once(value: float) -> Interval:
    return Interval(value, value, value)


def _ends(one: Interval) -> list[float]:
    return [one.low, one.high]


def _three(one: Interval) -> list[float]:
    return [one.point, one.low, one.high]
