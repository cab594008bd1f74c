"""Reports of the dense model, the champion and the challenger in, a verdict out. Pure: nothing is read or written.

Every interval is a 95% two-sided bootstrap over documents, paired where two artifacts are compared; a gate holds only
if the interval's bad end holds. Shapes: D documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flows.reporting.format import number
from flows.results import Bound, GateResult
from stages.measures.interval import Floats, Interval, bootstrap
from stages.measures.table import MEASURES
from stages.runtime.contract import StageError

Report = Mapping[str, Any]

CHAMPION = "champion"
SIZE = "size_bytes"


class Gate(Protocol):
    """What a recipe demands of a measure; `flows.recipe.model` has the typed record."""

    @property
    def measure(self) -> str:
        """A key of MEASURES, or `size_bytes`."""

    @property
    def against(self) -> str | None:
        """The artifact to divide by, `champion`, or None for the measure itself."""

    @property
    def artifact(self) -> str | None:
        """The judged artifact; None for every one that was executed."""

    @property
    def corpus(self) -> str | None:
        """The corpus; None for every one."""

    @property
    def at_most(self) -> float | None:
        """Upper limit."""

    @property
    def at_least(self) -> float | None:
        """Lower limit."""


@dataclass(frozen=True)
class Verdict:
    """All gates of a recipe. `targets` are the judged artifacts that were executed, with what executed them."""

    passed: bool
    results: tuple[GateResult, ...]
    targets: Mapping[str, str]


def judge(
    gates: Iterable[Gate],
    reports: Mapping[tuple[str, str], Report],
    sizes: Mapping[str, int],
    targets: Mapping[str, str | None],
) -> Verdict:
    """Apply each gate to each artifact and corpus that it speaks of.

    Args:
        gates: what is demanded.
        reports: (artifact, corpus) -> content of its `report.json`; also of the artifacts compared against.
        sizes: artifact -> bytes of its model files; also of the artifacts compared against.
        targets: judged artifact -> what it was executed on, None for one that was only compiled.

    Raises:
        StageError: a gate speaks of nothing that was measured, or of documents that cannot be paired.
    """
    executed = {name: target for name, target in targets.items() if target}
    results: list[GateResult] = []
    for gate in gates:
        found = [
            r for artifact in _artifacts(gate, sizes, targets) for r in _apply(gate, artifact, reports, sizes, executed)
        ]
        if not found:
            raise StageError(f"the gate on {gate.measure} applies to nothing that was executed", remedy=_JUDGE_MORE)
        results += found
    return Verdict(all(result.passed for result in results), tuple(results), executed)


_JUDGE_MORE = "Name an executed artifact and its corpora under `judge`, or take the gate out."


def _artifacts(gate: Gate, sizes: Mapping[str, int], targets: Mapping[str, str | None]) -> list[str]:
    if gate.measure != SIZE and gate.measure not in MEASURES:
        raise StageError(f"no gate can measure {gate.measure!r}", limit=", ".join((*MEASURES, SIZE)))
    if gate.artifact is None:
        return [name for name, target in targets.items() if target or gate.measure == SIZE]
    if gate.measure == SIZE and gate.artifact not in sizes:
        raise StageError(f"the size of {gate.artifact} is not known", remedy=_JUDGE_MORE)
    if gate.measure != SIZE and not targets.get(gate.artifact):
        raise StageError(
            f"a gate asks for {gate.measure} of {gate.artifact}, which was not executed", remedy=_JUDGE_MORE
        )
    return [gate.artifact]


def _apply(
    gate: Gate,
    artifact: str,
    reports: Mapping[tuple[str, str], Report],
    sizes: Mapping[str, int],
    targets: Mapping[str, str],
) -> Iterator[GateResult]:
    corpora = [""] if gate.measure == SIZE else _corpora(gate, artifact, reports)
    for corpus in corpora:
        if gate.against == CHAMPION and not _known(CHAMPION, reports, sizes):
            interval = None
        elif gate.measure == SIZE:
            interval = _size(artifact, gate.against, sizes)
        else:
            interval = _interval(gate, artifact, corpus, reports)
        yield from _results(gate, artifact, targets.get(artifact, ""), corpus, interval)


def _known(name: str, reports: Mapping[tuple[str, str], Report], sizes: Mapping[str, int]) -> bool:
    return name in sizes or any(artifact == name for artifact, _ in reports)


def _corpora(gate: Gate, artifact: str, reports: Mapping[tuple[str, str], Report]) -> list[str]:
    have = [corpus for name, corpus in reports if name == artifact]
    if gate.corpus is None:
        return have
    if gate.corpus not in have:
        raise StageError(
            f"{artifact} was not measured on {gate.corpus}", measured=", ".join(have) or "no corpus", remedy=_JUDGE_MORE
        )
    return [gate.corpus]


def _size(artifact: str, against: str | None, sizes: Mapping[str, int]) -> Interval:
    if against is not None and not sizes.get(against):
        raise StageError(f"the size of {against} is not known, so nothing can be compared with it", remedy=_JUDGE_MORE)
    size = float(sizes[artifact]) / (float(sizes[against]) if against is not None else 1.0)
    return Interval(size, size, size)


def _interval(gate: Gate, artifact: str, corpus: str, reports: Mapping[tuple[str, str], Report]) -> Interval:
    ours = reports[artifact, corpus]
    measure = MEASURES[gate.measure]
    tokens_D, ours_D = _column(ours, "tokens", artifact), _column(ours, measure.score, artifact)
    theirs_D = None
    if gate.against is not None:
        if (gate.against, corpus) not in reports:
            raise StageError(f"{gate.against} was not measured on {corpus}", remedy=f"Judge {gate.against} there too.")
        theirs = reports[gate.against, corpus]
        _check_paired(ours, theirs, f"{artifact} and {gate.against} on {corpus}")
        theirs_D = _column(theirs, measure.score, gate.against)
    return bootstrap(tokens_D, ours_D, theirs_D, exponential=measure.exponential)


def _column(report: Report, score: str, artifact: str) -> Floats:
    documents = sorted(report["documents"], key=lambda document: document["id"])
    if any(score not in document for document in documents):
        old = "It was measured before this was: gate against the baseline until a version that has it is promoted."
        remedy = old if artifact == CHAMPION else _measurable(report, score)
        raise StageError(f"the report of {artifact} has no {score!r}", remedy=remedy)
    return np.array([document[score] for document in documents], dtype=np.float64)


def _measurable(report: Report, score: str) -> str:
    fitting = {name: one for name, one in MEASURES.items() if report.get("task", "generate") in one.tasks}
    if any(one.score == score for one in fitting.values()):
        return "It needs `judge: {baseline: ...}`."
    return f"Gate on what a model of its task, {report['task']}, is measured by: {', '.join(fitting)}."


def _check_paired(ours: Report, theirs: Report, which: str) -> None:
    a, b = ({d["id"]: d["tokens"] for d in report["documents"]} for report in (ours, theirs))
    remedy = "Measure both on the same corpus, split and windows, with the same tokenizer."
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            raise StageError(
                f"the documents of {which} cannot be paired: {name} differs",
                measured=f"{a.get(name, 'no')} tokens",
                limit=f"{b.get(name, 'no')} tokens",
                remedy=remedy,
            )
    if ours.get("corpus") and theirs.get("corpus") and ours["corpus"] != theirs["corpus"]:
        raise StageError(f"the reports of {which} are of different corpora", remedy=remedy)
    if any(len(names) != len(report["documents"]) for names, report in ((a, ours), (b, theirs))):
        raise StageError(f"a document stands twice in the reports of {which}", remedy=remedy)


def _results(gate: Gate, artifact: str, target: str, corpus: str, interval: Interval | None) -> Iterator[GateResult]:
    bounds: Sequence[tuple[Bound, float | None]] = (("at_most", gate.at_most), ("at_least", gate.at_least))
    asked = [(bound, limit) for bound, limit in bounds if limit is not None]
    if not asked:
        raise StageError(f"the gate on {gate.measure} has no limit", limit="at_most or at_least")
    for bound, limit in asked:
        name = f"{gate.measure} of {artifact}" + (f" on {target}" if target else "")
        name += (f" against {gate.against}" if gate.against else "") + (f" on {corpus}" if corpus else "")
        finite = interval is not None and math.isfinite(interval.point)
        if interval is None:
            passed, outcome = True, "not applicable: no champion"
        elif not finite:
            passed, outcome = False, "measured no finite number"
        else:
            bad = interval.high if bound == "at_most" else interval.low
            passed = bad <= limit if bound == "at_most" else bad >= limit
            outcome = f"measured {number(interval.point)}"
            if interval.low != interval.high:
                outcome += f" (95% interval {number(interval.low)} to {number(interval.high)})"
        held = "" if interval is None else f": {'passed' if passed else 'FAILED'}"
        yield GateResult(
            measure=gate.measure,
            against=gate.against,
            artifact=artifact,
            target=target,
            corpus=corpus,
            measured=interval.point if interval and finite else None,
            low=_finite(interval.low) if interval else None,
            high=_finite(interval.high) if interval else None,
            bound=bound,
            limit=limit,
            passed=passed,
            text=f"{name}: {outcome}, limit {bound.replace('_', ' ')} {number(limit)}{held}",
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
