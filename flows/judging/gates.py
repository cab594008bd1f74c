"""Reports of the dense model, the champion and the challenger in, a verdict out. Pure: nothing is read or written.

Every interval is a 95% two-sided bootstrap over documents, paired where two artifacts are compared; a gate holds only
if the interval's bad end holds. Shapes: D documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from flows.judging.measured import CHAMPION, JUDGE_MORE, Found, Gate, found, has_any, of_size, on_request
from flows.judging.pairing import Report
from flows.judging.speeds import Speeds, of_speed
from flows.reporting.format import held_words, number
from flows.results import Bound, GateResult, Held
from stages.measures.interval import Interval
from stages.measures.table import MEASURES, SPEEDS, known, measure_of
from stages.runtime.contract import StageError

SIZE = "size_bytes"


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
    *,
    champion: str = "",
    speeds: Speeds = MappingProxyType({}),
) -> Verdict:
    """Apply each gate to each artifact and corpus that it speaks of.

    Args:
        gates: what is demanded.
        reports: (artifact, corpus) -> content of its `report.json`; also of the artifacts compared against.
        sizes: artifact -> bytes of its model files; also of the artifacts compared against.
        targets: judged artifact -> what it was executed on, None for one that was only compiled.
        champion: the version that stands, empty for none. A gate against one that stands and of which nothing is
            known is an error; only where none stands it holds nothing.
        speeds: (artifact, baseline) -> content of the `report.json` of `bench`.

    Raises:
        StageError: a gate speaks of nothing that was measured, or of documents that cannot be paired.
    """
    executed = {name: target for name, target in targets.items() if target}
    stands = bool(champion) or _known(CHAMPION, reports, sizes)
    results: list[GateResult] = []
    for gate in gates:
        applied = [
            result
            for artifact in _artifacts(gate, sizes, targets)
            for result in (
                _of_speed(gate, artifact, executed, speeds)
                if gate.measure in SPEEDS
                else _apply(gate, artifact, reports, sizes, executed, stands=stands)
            )
        ]
        if not applied:
            raise StageError(f"the gate on {gate.measure} applies to nothing that was executed", remedy=JUDGE_MORE)
        results += applied
    return Verdict(all(result.passed for result in results), tuple(results), executed)


def _artifacts(gate: Gate, sizes: Mapping[str, int], targets: Mapping[str, str | None]) -> list[str]:
    if gate.measure not in (SIZE, *SPEEDS) and known(gate.measure) is None:
        raise StageError(f"no gate can measure {gate.measure!r}", limit=", ".join((*MEASURES, SIZE, *SPEEDS)))
    if gate.artifact is None:
        itself = gate.against if gate.measure in SPEEDS else None  # nothing takes turns with itself
        return [name for name, target in targets.items() if (target or gate.measure == SIZE) and name != itself]
    if gate.measure == SIZE and gate.artifact not in sizes:
        raise StageError(f"the size of {gate.artifact} is not known", remedy=JUDGE_MORE)
    if gate.measure != SIZE and not targets.get(gate.artifact):
        raise StageError(
            f"a gate asks for {gate.measure} of {gate.artifact}, which was not executed", remedy=JUDGE_MORE
        )
    return [gate.artifact]


def _of_speed(gate: Gate, artifact: str, targets: Mapping[str, str], speeds: Speeds) -> Iterator[GateResult]:
    yield from _results(gate, artifact, targets[artifact], "", [of_speed(gate, artifact, speeds)])


def _apply(
    gate: Gate,
    artifact: str,
    reports: Mapping[tuple[str, str], Report],
    sizes: Mapping[str, int],
    targets: Mapping[str, str],
    *,
    stands: bool,
) -> Iterator[GateResult]:
    corpora = [""] if gate.measure == SIZE else _corpora(gate, artifact, reports)
    for corpus in corpora:
        if gate.against == CHAMPION and not stands:
            looked_at = [Found(None, why="no champion")]
        elif gate.measure == SIZE:
            looked_at = [Found(of_size(artifact, gate.against, sizes))]
        else:
            looked_at = found(gate, artifact, corpus, reports)
        yield from _results(gate, artifact, targets.get(artifact, ""), corpus, looked_at)


def _known(name: str, reports: Mapping[tuple[str, str], Report], sizes: Mapping[str, int]) -> bool:
    return name in sizes or any(artifact == name for artifact, _ in reports)


def _corpora(gate: Gate, artifact: str, reports: Mapping[tuple[str, str], Report]) -> list[str]:
    have = [corpus for name, corpus in reports if name == artifact]
    if gate.corpus is None:
        of_items = measure_of(gate.measure).of_items
        alike = [one for one in have if bool(reports[artifact, one].get("items")) == of_items]
        having = [one for one in alike if not of_items or has_any(reports[artifact, one], gate.measure)]
        # What only is measured where it is asked for is missed where it is not: what to say is told there.
        return having or (alike if on_request(gate.measure) else [])
    if gate.corpus not in have:
        raise StageError(
            f"{artifact} was not measured on {gate.corpus}", measured=", ".join(have) or "no corpus", remedy=JUDGE_MORE
        )
    return [gate.corpus]


_OTHER: Mapping[Held, Held] = {"bad end": "good end", "good end": "bad end"}


@dataclass(frozen=True)
class _Limit:
    """A bound and what is held against it: the interval's bad end, the value itself, or the interval's good end."""

    bound: Bound
    limit: float
    held: Held

    def met(self, interval: Interval) -> float:
        """What is held against the limit, as how far it is on the good side."""
        upper = self.bound == "at_most"
        ends = {"value": interval.point, "bad end": interval.low, "good end": interval.high}
        held = ends[self.held] if not upper or self.held == "value" else ends[_OTHER[self.held]]
        return self.limit - held if upper else held - self.limit


def _limits(gate: Gate) -> list[_Limit]:
    asked: Sequence[tuple[Bound, float | None, Held]] = (
        ("at_most", gate.at_most, "bad end"),
        ("at_least", gate.at_least, "bad end"),
        ("at_most", gate.value_at_most, "value"),
        ("at_least", gate.value_at_least, "value"),
        ("at_most", gate.low_at_most, "good end"),
        ("at_least", gate.high_at_least, "good end"),
    )
    limits = [_Limit(bound, limit, held) for bound, limit, held in asked if limit is not None]
    if not limits:
        raise StageError(f"the gate on {gate.measure} has no limit", limit="at_most or at_least")
    return limits


def _results(gate: Gate, artifact: str, target: str, corpus: str, looked_at: Sequence[Found]) -> Iterator[GateResult]:
    for limit in _limits(gate):
        # A NaN is worse than any number.
        worst = min(looked_at, key=lambda one: _margin(limit, one))
        yield _result(gate, limit, worst, artifact=artifact, target=target, corpus=corpus)


def _margin(limit: _Limit, one: Found) -> float:
    margin = math.inf if one.interval is None else limit.met(one.interval)
    return -math.inf if math.isnan(margin) else margin


def _result(gate: Gate, limit: _Limit, one: Found, *, artifact: str, target: str, corpus: str) -> GateResult:
    name = f"{gate.measure} of {artifact}" + (f" on {target}" if target else "")
    name += (f" against {gate.against}" if gate.against else "") + (f" on {corpus}" if corpus else "")
    name += (f", worst slice {one.slice}" if gate.worst else f", slice {one.slice}") if one.slice else ""
    interval, beside = one.interval, f" ({one.why})" if one.why else ""
    finite = interval is not None and math.isfinite(interval.point)
    if interval is None:
        passed, outcome, beside = not one.failed, f"not applicable: {one.why}", ""
        if one.failed:
            outcome = one.why
    elif not finite:
        passed, outcome = False, "measured no finite number"
    else:
        passed = limit.met(interval) >= 0
        outcome = f"measured {number(interval.point)}"
        if interval.low != interval.high:
            outcome += f" (95% interval {number(interval.low)} to {number(interval.high)})"
        if not passed and limit.held == "bad end" and corpus and replace(limit, held="value").met(interval) >= 0:
            beside += " (the value holds: more text or items, or more `windows`, narrow the interval)"
    held = "" if interval is None and not one.failed else f": {'passed' if passed else 'FAILED'}"
    bound = f"{held_words(limit.bound, limit.held)}{limit.bound.replace('_', ' ')} {number(limit.limit)}"
    return GateResult(
        measure=gate.measure,
        against=gate.against,
        artifact=artifact,
        target=target,
        corpus=corpus,
        slice=one.slice,
        worst=gate.worst,
        measured=interval.point if interval and finite else None,
        low=_finite(interval.low) if interval else None,
        high=_finite(interval.high) if interval else None,
        bound=limit.bound,
        held=limit.held,
        limit=limit.limit,
        passed=passed,
        text=f"{name}: {outcome}, limit {bound}{beside}{held}",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
