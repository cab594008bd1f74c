"""How fast what is judged is, beside its quality: what reports of `bench` say, device by device.

Figures of two devices never stand in one table or chart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.reporting.charts import pareto_chart
from flows.reporting.format import number, short_number, short_size
from stages.measures.table import SPEED, SPEEDS, foremost, foremost_speed, title

if TYPE_CHECKING:
    from markupsafe import Markup

Report = Mapping[str, Any]
_LESS_IS_BETTER = frozenset({"perplexity", "pseudo_perplexity", "kl_divergence", "relative_error"})
_ITSELF: Mapping[str, float] = {"kl_divergence": 0, "top1_agreement": 1, "cosine": 1, "relative_error": 0}
"""What compares with the baseline says this of the baseline."""


@dataclass(frozen=True)
class Line:
    """One row: whose it is, what executed it, and a figure under each heading."""

    name: str
    target: str
    figures: Sequence[str]


@dataclass(frozen=True)
class SpeedTable:
    """What was measured on one device.

    Attributes:
        device: its name.
        asked: what the figures are of, in words.
        headings: of the figures.
        lines: the baseline, then what was measured in turn with it, each with its ratio and the ratio's interval.
        batches: how many prompts of how many tokens, and what each of the lines has for them.
        chart: quality against speed.
    """

    device: str
    asked: str
    headings: Sequence[str]
    lines: Sequence[Line]
    batches: Sequence[tuple[tuple[int, int], Line]]
    chart: Markup | str


def speed_tables(
    speeds: Mapping[tuple[str, str], Report], reports: Mapping[tuple[str, str], Report]
) -> list[SpeedTable]:
    """A table for each device.

    Args:
        speeds: (artifact, baseline) -> content of the `report.json` of `bench`.
        reports: (artifact, corpus) -> content of that of `validate`.
    """
    devices: dict[tuple[str, str], dict[tuple[str, str], Report]] = {}
    for pair, report in speeds.items():
        # Of what writes and of what does not other figures are measured.
        devices.setdefault((report["executor"]["device"], foremost_speed(report["task"])), {})[pair] = report
    return [_table(device, foremost, some, reports) for (device, foremost), some in devices.items()]


def _table(
    device: str, speed: str, some: Mapping[tuple[str, str], Report], reports: Mapping[tuple[str, str], Report]
) -> SpeedTable:
    first = next(iter(some.values()))
    said = first[SPEED]
    names = [name for name in SPEEDS if any(name in one[SPEED]["artifact"]["measures"] for one in some.values())]
    lines, points, batches = list[Line](), list[tuple[str, float]](), list[tuple[tuple[int, int], Line]]()
    for name, role, report in _contestants(some):
        own, ratios = report[SPEED][role], report[SPEED].get("ratios", {}) if role == "artifact" else {}
        lines.append(Line(name, _target(own), [_figure(one, own["measures"], ratios) for one in names]))
        points.append((name, _placed(speed, role, report, some)))
        for cell in report["cells"]:
            which = (cell["batch"], cell["prompt_tokens"])
            values = cell[role]["measures"]
            ratios = cell.get("ratios", {}) if role == "artifact" else {}
            batches.append((which, Line(name, "", [_figure(one, values, ratios) for one in names])))
    prompts = "one prompt" if said["batch"] == 1 else f"{said['batch']} prompts at once"
    asked = f"{prompts} of {said['prompt_tokens']:,} tokens" + (
        f", {said['new_tokens']} new ones behind" if said["new_tokens"] else ""
    )
    asked += f"; {first['repeats']} rounds"
    headings = [SPEEDS[one].title for one in names]
    return SpeedTable(
        device, asked, headings, lines, sorted(batches, key=lambda one: one[0]), _pareto(speed, points, some, reports)
    )


def _contestants(some: Mapping[tuple[str, str], Report]) -> Iterator[tuple[str, str, Report]]:
    """Name, role and report of each baseline, as it was first measured, and of each artifact."""
    seen = set[str]()
    for (_, baseline), report in some.items():
        if "baseline" in report[SPEED] and baseline not in seen:
            seen.add(baseline)
            yield baseline, "baseline", report
    for (artifact, _), report in some.items():
        if artifact not in seen:
            yield artifact, "artifact", report


def _placed(speed: str, role: str, report: Report, some: Mapping[tuple[str, str], Report]) -> float:
    """A speed on the chart: what an artifact is beside its baseline's turns, so that a busier hour moves no point."""
    own = float(report[SPEED][role]["measures"][speed])
    ratio = report[SPEED].get("ratios", {}).get(speed) if role == "artifact" else None
    if ratio is None:
        return own
    baseline = next(one for (_, one), its in some.items() if its is report)
    first = next(its for (_, one), its in some.items() if one == baseline and "baseline" in its[SPEED])
    return float(first[SPEED]["baseline"]["measures"][speed]) * float(ratio[0])


def _target(own: Report) -> str:
    threads = own["threads"]
    return f"{own['target']}, {threads} thread{'' if threads == 1 else 's'}"


def _figure(name: str, values: Mapping[str, float], ratios: Mapping[str, Sequence[float]]) -> str:
    if name not in values:
        return ""
    value = short_size(values[name]) if name.endswith("_bytes") else short_number(values[name])
    if name not in ratios:
        return value
    point, low, high = ratios[name]
    ends = f" ({number(low)} to {number(high)})" if low < high else ""
    return f"{value}; {number(point)}{ends}"


def _pareto(
    speed: str,
    points: Sequence[tuple[str, float]],
    some: Mapping[tuple[str, str], Report],
    reports: Mapping[tuple[str, str], Report],
) -> Markup | str:
    """Quality on the first corpus that says it against speed, one point an artifact, the baseline among them."""
    names = {name for name, _ in points}
    measured = {pair: one["measures"] for pair, one in reports.items() if pair[0] in names}
    if not measured:
        return ""
    quality = foremost(*measured.values())
    corpus = next((corpus for (_, corpus), one in measured.items() if quality in one), "")
    baselines = {baseline for _, baseline in some}
    placed = []
    for name, fast in points:
        good = measured.get((name, corpus), {}).get(quality, _ITSELF.get(quality) if name in baselines else None)
        if good is not None:
            placed.append((name, fast, good))
    up = f"{title(quality)} on {corpus}"
    return pareto_chart(placed, SPEEDS[speed].title, up, less_is_better=quality in _LESS_IS_BETTER)
