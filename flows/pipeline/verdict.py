"""The judgement on a run: champion, reports, gates, engines, and what stands beside the champion. It only reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.judging.gates import Verdict, judge
from flows.judging.measured import CHAMPION
from flows.pipeline.champion import Champion, champion_of, reports_of, size_of
from flows.registry.journal import Executable
from flows.registry.model_card import Compared, compared
from flows.results import GateResult, RunVerdict, run_verdict
from flows.running.session import MODELS, Session, manifest_of, model_size
from stages.measures.table import BENCH
from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind

Reports = dict[tuple[str, str], dict[str, Any]]
"""(artifact, corpus) -> content of its `report.json`."""
Speeds = dict[tuple[str, str], dict[str, Any]]
"""(artifact, baseline that it took turns with) -> content of the `report.json` of `bench`."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the steps of a run were found to have made.

    Attributes:
        verdict: over all gates, None where the recipe has neither gates nor anything to judge.
        reports: those of the run, and the champion's where a gate asks for it.
        engines: step name -> engine that is judged or asked to be, with what may be said of it.
        champion: the version that stood when the run was judged.
        beside: the measures of the engine that is served, beside the champion's.
        speeds: what `bench` found, where `judge` asks for it.
    """

    verdict: Verdict | None
    reports: Reports
    engines: Mapping[str, Executable]
    champion: Champion
    beside: Sequence[Compared]
    speeds: Speeds = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate holds; what is not judged does not fail."""
        return self.verdict.passed if self.verdict else True

    @property
    def outcome(self) -> RunVerdict:
        """The run's verdict in a word."""
        return run_verdict(self.gates)

    @property
    def gates(self) -> list[GateResult]:
        """The gates as they were applied."""
        return list(self.verdict.results) if self.verdict else []

    @property
    def serves(self) -> str:
        """The step whose engine an alias would serve, empty for none."""
        return _serves(self.engines)


def judged(session: Session, champion: Champion | None = None) -> Judgement:
    """Judge what the steps made.

    Args:
        session: whose steps are done.
        champion: what the verdict holds against, as the steps have measured it; as it stands now by default.

    Raises:
        StageError: a gate speaks of nothing that was measured, or an artifact is gone.
        Unavailable: the store does not answer.
    """
    champion = champion or champion_of(session.recipe, session.store)
    reports, speeds, engines = _reports(session), _speeds(session), _engines(session)
    theirs = reports_of(session, champion, _serves(engines))
    verdict = None
    if session.recipe.judge is not None or session.recipe.gates:  # a size is held without a measurement
        if any(gate.against == CHAMPION for gate in session.recipe.gates):
            reports |= {(CHAMPION, corpus): report for corpus, report in theirs.items()}
        verdict = _verdict(session, reports, speeds, champion)
    beside = _beside(session, _serves(engines), reports, theirs, size_of(champion, session.store))
    return Judgement(verdict=verdict, reports=reports, engines=engines, champion=champion, beside=beside, speeds=speeds)


def _reports(session: Session) -> Reports:
    return {
        (step.measures, step.corpus): _json(session.store, session.done[step.name].fingerprint, "report.json")
        for step in session.steps
        if step.measures and step.measures != CHAMPION and step.stage != BENCH
    }


def _speeds(session: Session) -> Speeds:
    baseline = session.recipe.judge.baseline if session.recipe.judge else ""
    return {
        (step.measures, baseline): _json(session.store, session.done[step.name].fingerprint, "report.json")
        for step in session.steps
        if step.measures and step.stage == BENCH
    }


def _verdict(session: Session, reports: Reports, speeds: Speeds, champion: Champion) -> Verdict:
    recipe = session.recipe
    models = [step.name for step in recipe.steps if session.done[step.name].kind in MODELS]
    sizes = {name: model_size(manifest_of(session, name)) for name in models}
    size = size_of(champion, session.store)
    if size is not None and any(gate.against == CHAMPION for gate in recipe.gates):
        sizes[CHAMPION] = size
    targets = {
        name: next((r["artifact_target"] for (a, _), r in reports.items() if a == name), None)
        for name in (recipe.judge.artifacts if recipe.judge else ())
    }
    return judge(recipe.gates, reports, sizes, targets, champion=champion.version, speeds=speeds)


def _engines(session: Session) -> dict[str, Executable]:
    executed = {step.name: step.target for step in session.steps}
    found: dict[str, Executable] = {}
    for name in session.recipe.judge.artifacts if session.recipe.judge else ():
        step = session.done[name]
        if step.kind is Kind.ENGINE:
            target = _json(session.store, step.fingerprint, "engine.json")["target"]
            found[name] = _executable(step.fingerprint, target, executed[name])
    return found


def _executable(fingerprint: str, compiled: str, executed: str) -> Executable:
    """An engine compiled for a target, `tensorrt_rtx:sm_89+sm_120`, and executed on one of its GPUs or on none."""
    name, _, architectures = compiled.partition(":")
    besides = [one for one in architectures.split("+") if executed and f"{name}:{one}" != executed]
    return Executable(
        fingerprint=fingerprint,
        target=executed or compiled,
        judged=bool(executed),
        besides=f"{name}:{'+'.join(besides)}" if besides else "",
    )


def _serves(engines: Mapping[str, Executable]) -> str:
    return next((name for name, engine in engines.items() if engine.judged), "")


def _beside(
    session: Session, serves: str, reports: Reports, champions: Mapping[str, dict[str, Any]], size: int | None
) -> list[Compared]:
    if not serves:
        return []
    ours = {corpus: report["measures"] for (name, corpus), report in reports.items() if name == serves}
    theirs = {corpus: report["measures"] for corpus, report in champions.items()}
    sizes = {"": {"size_bytes": float(model_size(manifest_of(session, serves)))}}
    served = {"": {"size_bytes": float(size)}} if size is not None else {}
    without = {corpus: {k: v for k, v in one.items() if k != "size_bytes"} for corpus, one in ours.items()}
    return compared({**without, **sizes}, {**theirs, **served})


def _json(store: Store, identity: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store.checkout(identity) / name).read_text(encoding="utf-8"))
    return found
