"""What the steps of a run say of speed, device by device, where there is room for a line."""

from __future__ import annotations

from collections.abc import Sequence

from flows.reporting.format import number, short_size
from flows.results import StepResult
from stages.measures.table import BENCH


def timed(steps: Sequence[StepResult]) -> dict[str, list[StepResult]]:
    """Device -> the measurements of speed that were made on it."""
    found: dict[str, list[StepResult]] = {}
    for step in steps:
        if step.stage == BENCH and step.measures:
            found.setdefault(step.device, []).append(step)
    return found


def told(step: StepResult, name: str) -> str:
    """A figure of a measurement, and in brackets its ratio to the baseline's."""
    if name not in step.metrics:
        return "-"
    value = short_size(step.metrics[name]) if name.endswith("_bytes") else number(step.metrics[name])
    ratio = step.metrics.get(f"{name}_ratio")
    return value if ratio is None else f"{value} ({number(ratio)})"
