"""What a gate on a speed comes to: of one report of `bench`, and so of one device.

Two reports are never compared: what an artifact was measured in turn with stands in its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from flows.judging.measured import Found, Gate
from flows.judging.pairing import Report
from stages.measures.interval import Interval
from stages.measures.table import SPEED, SPEEDS
from stages.runtime.contract import StageError

Speeds = Mapping[tuple[str, str], Report]
"""(artifact, baseline that it took turns with) -> content of the `report.json` of `bench`."""


def of_speed(gate: Gate, artifact: str, speeds: Speeds) -> Found:
    """The figure of an artifact, or its ratio to the baseline's, and the device that it is of.

    Raises:
        StageError: it was not measured, or not in turn with what the gate compares it with.
    """
    beside = {other: report for (name, other), report in speeds.items() if name == artifact}
    if not beside:
        remedy = "Say `judge: {speed: true}`, or take the gate out."
        raise StageError(f"a gate asks for {gate.measure} of {artifact}, whose speed was not measured", remedy=remedy)
    report = next(iter(beside.values()))
    # By name, a gate that cannot hold is refused before any work; of every artifact it speaks of those that it can.
    if gate.against is not None and gate.artifact is None and "ratios" not in report[SPEED]:
        return Found(None, why=f"timed alone on {device(report)}, since torch is built without CUDA")
    if gate.against is not None and (gate.against not in beside or "ratios" not in beside[gate.against][SPEED]):
        raise StageError(
            f"{artifact} was not measured in turn with {gate.against}, so their speeds cannot be compared",
            limit=", ".join(name for name, one in beside.items() if "ratios" in one[SPEED]) or "none",
            remedy="Compare with the baseline: another report may be of another device or of a busier hour.",
        )
    report = beside[gate.against] if gate.against is not None else report
    said = report[SPEED]
    have = said["artifact"]["measures"] if gate.against is None else said["ratios"]
    if gate.measure not in have:
        fitting = ", ".join(name for name in SPEEDS if name in have)
        raise StageError(
            f"a gate asks for {gate.measure} of {artifact}, which is not measured of a model of its task",
            measured=f"its task is {report['task']}",
            limit=fitting,
            remedy=f"Gate on one of these: {fitting}.",
        )
    return Found(_interval(gate, said), why=f"on {device(report)}")


def device(report: Report) -> str:
    """The device that a report of `bench` is of, with the threads that computed there."""
    threads = report[SPEED]["artifact"]["threads"]
    return f"{report['executor']['device']}, {threads} thread{'' if threads == 1 else 's'}"


def _interval(gate: Gate, said: Report) -> Interval:
    if gate.against is not None:
        return Interval(*said["ratios"][gate.measure])
    value = said["artifact"]["measures"][gate.measure]
    return Interval(value, *said["artifact"]["intervals"].get(gate.measure, (value, value)))
