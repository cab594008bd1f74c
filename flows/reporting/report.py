"""A run as one HTML file: verdict first, then what was measured, what was made and how to make it again.

The file asks for nothing from anywhere, holds no script and escapes every text that it was given.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.reporting.abilities import ItemSet
from flows.reporting.charts import curve_chart, interval_chart, steps_chart
from flows.reporting.format import duration, short_number, short_size
from flows.reporting.speed import SpeedTable
from flows.results import GateResult, RunResult, StepResult
from stages.measures.table import BROUGHT, MEASURES, foremost, title
from stages.runtime.artifacts import BLOBS, Store
from stages.runtime.contract import Manifest

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

Reports = Mapping[tuple[str, str], Mapping[str, Any]]
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
CURVE = "curve.json"
"""A file of this name in an artifact holds {metric: [[step, value], ...]}: it outlives the run that drew it."""
MOST_POINTS = 400


@dataclass(frozen=True)
class Row:
    """One step of the table."""

    step: StepResult
    size_bytes: float | None
    parameters: float | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Drawn:
    """What a report shows beside what every run has.

    Attributes:
        curves: step name -> metric -> (step, value) points, see `curves_of`.
        items: what was asked of dense and the rest, see `flows.reporting.abilities`.
        speeds: how fast what is judged is, see `flows.reporting.speed`.
    """

    curves: Curves = field(default_factory=dict)
    items: Sequence[ItemSet] = ()
    speeds: Sequence[SpeedTable] = ()


def write_report(
    result: RunResult,
    manifests: Mapping[str, Manifest],
    reports: Reports,
    recipe_text: str,
    command: Sequence[str],
    path: Path,
    *,
    drawn: Drawn | None = None,
) -> None:
    """Write the report of a run.

    Args:
        result: what it came to.
        manifests: step name -> manifest of its artifact.
        reports: (artifact, corpus) -> content of its `report.json`.
        recipe_text: the recipe as it ran.
        command: argv of the run.
        path: the file to write.
        drawn: what is shown beside.
    """
    drawn = drawn or Drawn()
    shown = foremost(*(report["measures"] for report in reports.values()))
    corpora = list(dict.fromkeys(corpus for (_, corpus), report in reports.items() if shown in report["measures"]))
    own = dict.fromkeys(key for report in reports.values() for key in report["measures"] if key.startswith(BROUGHT))
    rows = [_row(step, manifests, reports, shown) for step in result.steps if step.kind != "report"]
    charted = [row for row in rows if row.step.kind != "corpus"]
    page = _template().render(
        result=result,
        failed=[gate for gate in result.gates if not gate.passed],
        gates=[(gate, _gate_chart(gate)) for gate in result.gates],
        rows=rows,
        corpora=corpora,
        items=drawn.items,
        speeds=drawn.speeds,
        measures={name: title(name) for name in (*MEASURES, *own)},
        measurements=[step for step in result.steps if step.kind == "report"],
        chart=steps_chart([(row.step.name, row.size_bytes, row.scores) for row in charted], corpora, title(shown)),
        shown=title(shown),
        curves={
            step: [curve_chart(name, _thinned(points)) for name, points in drawn.items()]
            for step, drawn in drawn.curves.items()
        },
        manifests=manifests,
        versions=_versions(manifests),
        made_at=sorted({f"{one.provenance.host} ({one.provenance.device})" for one in manifests.values()}),
        commits=sorted({one.provenance.commit for one in manifests.values() if one.provenance.commit}),
        recipe=recipe_text,
        command=reproduce(command),
    )
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_text(page, encoding="utf-8")
    whole.replace(path)


def curves_of(
    store: Store, manifests: Mapping[str, Manifest], events: Iterable[Mapping[str, Any]] = ()
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What stages drew, by step: the curve in the artifact, else what the run's record heard while it was made.

    Args:
        store: where the artifacts are.
        manifests: step name -> manifest.
        events: of the record; those that say `metric` count.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for event in events:
        if event.get("event") == "metric":
            points = curves.setdefault(event["step"], {}).setdefault(event["name"], [])
            points.append((float(event["at_step"]), float(event["value"])))
    for step, manifest in manifests.items():
        entry = manifest.files.get(CURVE)
        data = store.objects.read(f"{BLOBS}{entry.sha256[:2]}/{entry.sha256}") if entry else None
        if data is not None:
            drawn = json.loads(data)
            curves[step] = {name: [(float(x), float(y)) for x, y in points] for name, points in drawn.items()}
    return {step: curves[step] for step in manifests if step in curves}


def reproduce(command: Sequence[str]) -> str:
    """The command line that ran, as one may paste it, also where `python -m flows` stood in its place."""
    return shlex.join(["enginery", *command[1:]]) if command else ""


def _row(step: StepResult, manifests: Mapping[str, Manifest], reports: Reports, shown: str) -> Row:
    manifest = manifests.get(step.name)
    metrics = step.metrics
    weight = metrics.get("size_bytes", float(manifest.size_bytes) if manifest else None)
    scores = {
        corpus: float(report["measures"][shown])
        for (artifact, corpus), report in reports.items()
        if artifact == step.name and shown in report["measures"]
    }
    return Row(step, weight, metrics.get("parameters"), scores)


def _gate_chart(gate: GateResult) -> Markup | str:
    if gate.measured is None:
        return ""
    low = gate.measured if gate.low is None else gate.low
    high = gate.measured if gate.high is None else gate.high
    return interval_chart(gate.measured, low, high, gate.limit, upper=gate.bound == "at_most")


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = -(-len(points) // MOST_POINTS) or 1
    return [*points[::stride], *([points[-1]] if points and (len(points) - 1) % stride else [])]


def _versions(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    found: dict[str, str] = {}
    for manifest in manifests.values():
        found |= manifest.work.requires
    return dict(sorted(found.items()))


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seconds = partial(duration, tenths_below_s=60)
    environment.filters |= {"size": short_size, "number": short_number, "duration": seconds}
    return environment.get_template("report.html")
