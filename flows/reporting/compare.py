"""Two artifacts or two runs side by side: what was measured, and of runs also the recipe's values and the gates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from flows.reporting.format import held_words, number
from flows.reporting.inspect_artifact import find_artifact
from flows.results import RunResult
from stages import STAGES, stage
from stages.runtime.artifacts import Store
from stages.runtime.contract import Frozen, Kind, Work
from stages.runtime.fingerprint import first_difference


class Pair(Frozen):
    """One row of a comparison; None where a side has no such thing."""

    a: Any
    b: Any


class CompareResult(Frozen):
    """`enginery compare --json`: two artifacts or two runs.

    Attributes:
        params: of two runs: the recipes' values by their paths.
        gates: of two runs: how they ended, and what became of each gate.
        difference: of two artifacts: the first field in which their works differ.
    """

    a: str
    b: str
    measures: dict[str, Pair]
    params: dict[str, Pair]
    gates: dict[str, Pair]
    difference: str


@dataclass(frozen=True)
class Run:
    """A recorded run: its state, its recipe as it ran, and its result if it came to one."""

    state: str
    recipe: str
    result: RunResult | None


@dataclass(frozen=True)
class _Side:
    measures: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)


def compared(store: Store, names: tuple[str, str], runs: tuple[Run | None, Run | None]) -> CompareResult:
    """Everything of both sides, equal or not.

    Args:
        store: where artifacts lie.
        names: of an artifact, or of a run, each.
        runs: the record of each name that is a run's.

    Raises:
        StageError: a name is neither.
    """
    one, other = (_asked_of(store, run) for run in runs)
    left, right = (
        _of_run(run, said) if run else _Side(_measures(store, name))
        for name, run, said in zip(names, runs, (_apart(one, other), _apart(other, one)), strict=True)
    )
    return CompareResult(
        a=names[0],
        b=names[1],
        measures=_pairs(left.measures, right.measures),
        params=_pairs(left.params, right.params) if all(runs) else {},
        gates=_pairs(left.gates, right.gates) if all(runs) else {},
        difference="" if any(runs) else _difference(store, *names),
    )


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested mappings with the path to it; records in a list go by their `name`, or by their number."""
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        inner = {str(one.get("name", place)): one for place, one in enumerate(value)}.items()
    else:
        yield path, value
        return
    for name, one in inner:
        yield from flat(one, f"{path}.{name}" if path else str(name))


def _asked_of(store: Store, run: Run | None) -> dict[str, tuple[str, str]]:
    """Measurement of a run -> what it was asked, and of which text, as far as the store still has its report."""
    found: dict[str, tuple[str, str]] = {}
    for step in run.result.steps if run and run.result else ():
        if step.kind is Kind.REPORT and (manifest := store.manifest(step.fingerprint)):
            found[step.name] = (_asked(manifest.work), f", text {manifest.work.inputs.get('text', '')[:8]}")
    return found


def _apart(ours: Mapping[str, tuple[str, str]], theirs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """What is to be said beside each measurement that the other side asked otherwise, or of another text."""
    pairs = {name: zip(said, theirs[name], strict=True) for name, said in ours.items() if name in theirs}
    return {name: "".join(one for one, other in pair if one != other) for name, pair in pairs.items()}


def _of_run(run: Run, said: Mapping[str, str]) -> _Side:
    result = run.result
    measures: dict[str, Any] = {"seconds": result.seconds} if result else {}
    gates: dict[str, Any] = {}
    for step in result.steps if result else ():
        # A speed is of one device, a figure of what was asked: of two they are rows of their own, never a pair.
        where = (f" on {step.device}" if step.device else "") + said.get(step.name, "")
        measures |= {f"{step.name} {name}{where}": value for name, value in step.metrics.items()}
    for gate in result.gates if result else ():
        against = f" against {gate.against}" if gate.against else ""
        where = f" on {gate.corpus}" if gate.corpus else ""
        where += f" ({'worst slice' if gate.worst else gate.slice})" if gate.worst or gate.slice else ""
        bound = f"{held_words(gate.bound, gate.held)}{gate.bound.replace('_', ' ')}"
        held, name = (
            "passed" if gate.passed else "failed",
            f"{gate.measure} of {gate.artifact}{against}{where}, {bound}",
        )
        # Two gates may differ in nothing but their limits.
        alike = sum(one == name or one.startswith(f"{name} (") for one in gates)
        name += f" ({alike + 1})" if alike else ""
        gates[name] = f"{held}: {number(gate.measured)}, limit {number(gate.limit)}"
    return _Side(measures, dict(flat(yaml.safe_load(run.recipe))), {"state": run.state, **gates})


def _measures(store: Store, name: str) -> dict[str, float]:
    """An artifact's metrics and those of the reports about it; of two reports that were asked alike the later one's."""
    identity = find_artifact(store, name)
    manifest = store.manifest(identity)
    assert manifest is not None
    found = {"files_bytes": float(manifest.size_bytes), **manifest.metrics}
    reports = [one for _, one in store.manifests() if one.kind is Kind.REPORT]
    for report in sorted(reports, key=lambda one: one.provenance.created):
        if report.work.inputs.get("model") == identity:
            where = f"{report.work.inputs.get('text', '')[:8]}{_asked(report.work)}"
            found |= {f"{key} on {where}": value for key, value in report.metrics.items() if key != "size_bytes"}
        elif report.work.inputs.get("artifact") == identity:
            where = f"{report.work.executor['device']}{_asked(report.work)}"
            found |= {f"{key} on {where}": value for key, value in report.metrics.items()}
    return found


def _asked(work: Work) -> str:
    """What a report was asked for otherwise than by default: figures of other windows or items are no pair.

    What executed it says nothing of that: a checkpoint and its engine are measured on two targets.
    """
    fields = stage(work.stage).params.model_fields if work.stage in STAGES else {}
    usual = {name: _plain(field.default) for name, field in fields.items()}
    asked = {name: value for name, value in sorted(work.params.items()) if name != "target"}
    return "".join(f", {name} {_said(value)}" for name, value in asked.items() if _plain(value) != usual.get(name))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _pairs(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Pair]:
    return {name: Pair(a=left.get(name), b=right.get(name)) for name in dict.fromkeys([*left, *right])}


def _difference(store: Store, a: str, b: str) -> str:
    left, right = (store.manifest(find_artifact(store, name)) for name in (a, b))
    assert left is not None and right is not None
    return first_difference(left.work, right.work)
