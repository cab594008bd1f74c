"""The judgement on a run: champion, reports, gates, engines, and what stands beside the champion. It only reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.judging.gates import Verdict, judge
from flows.judging.measured import CHAMPION
from flows.registry.journal import Executable, head
from flows.registry.model_card import Compared, compared
from flows.results import GateResult, RunVerdict, run_verdict
from flows.running.session import MODELS, Session, manifest_of, model_size
from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind

Reports = dict[tuple[str, str], dict[str, Any]]
"""(artifact, corpus) -> content of its `report.json`."""


@dataclass(frozen=True)
class Champion:
    """The version that the alias stands on, as far as it is known here.

    Attributes:
        version: its number, empty for none.
        entry: number of the journal's entry for the alias that was looked at, 0 for none.
        reports: corpus -> report of the engine that it serves.
        size_bytes: of that engine, None where it is not in the store.
    """

    version: str = ""
    entry: int = 0
    reports: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the steps of a run were found to have made.

    Attributes:
        verdict: over all gates, None where the recipe has neither gates nor anything to judge.
        reports: those of the run, and the champion's where a gate asks for it.
        engines: step name -> engine that is judged or asked to be, with what may be said of it.
        champion: the version that stood when the run was judged.
        beside: the measures of the engine that is served, beside the champion's.
    """

    verdict: Verdict | None
    reports: Reports
    engines: Mapping[str, Executable]
    champion: Champion
    beside: Sequence[Compared]

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


def judged(session: Session) -> Judgement:
    """Judge what the steps made.

    Raises:
        StageError: a gate speaks of nothing that was measured, or an artifact is gone.
        Unavailable: the store does not answer.
    """
    reports = _reports(session)
    champion = _champion(session, reports)
    verdict = None
    if session.recipe.judge is not None or session.recipe.gates:  # a size is held without a measurement
        if any(gate.against == CHAMPION for gate in session.recipe.gates):
            reports |= {(CHAMPION, corpus): report for corpus, report in champion.reports.items()}
        verdict = _verdict(session, reports, champion)
    engines = _engines(session)
    beside = _beside(session, _serves(engines), reports, champion)
    return Judgement(verdict=verdict, reports=reports, engines=engines, champion=champion, beside=beside)


def _champion(session: Session, ours: Reports) -> Champion:
    """The version now served, its reports found by its fingerprint among those on the same corpora.

    A corpus is known by its digest: the step that made the champion's may have been another, or of older code. Of
    several reports on one the newest that has our documents is taken.
    """
    register, judged_as = session.recipe.register_as, session.recipe.judge
    entry = head(session.store.objects, register.model, register.alias) if register else None
    if entry is None or judged_as is None:
        return Champion(entry=entry.number if entry else 0)
    served = entry.candidate.executables[entry.candidate.serves].fingerprint
    made = session.store.manifest(served)
    steps = {session.done[name].fingerprint: name for name in judged_as.corpora}
    digests = {report["corpus"]: corpus for (_, corpus), report in ours.items() if report.get("corpus")}
    documents = {corpus: _ids(report) for (_, corpus), report in ours.items()}
    kept = [(one.provenance.created, identity, one) for identity, one in session.store.manifests()]
    reports: dict[str, dict[str, Any]] = {}
    for _, identity, manifest in sorted(kept, key=lambda one: one[:2]):
        if manifest.kind is Kind.REPORT and manifest.work.inputs.get("model") == served:
            report = _json(session.store, identity, "report.json")
            corpus = digests.get(report.get("corpus", "")) or steps.get(manifest.work.inputs.get("text", ""))
            if corpus and (corpus not in reports or _ids(report) == documents[corpus]):
                reports[corpus] = report
    return Champion(entry.version.number, entry.number, reports, model_size(made) if made else None)


def _ids(report: Mapping[str, Any]) -> list[str]:
    return sorted(document["id"] for document in report["documents"])


def _reports(session: Session) -> Reports:
    return {
        (step.measures, step.corpus): _json(session.store, session.done[step.name].fingerprint, "report.json")
        for step in session.steps
        if step.measures
    }


def _verdict(session: Session, reports: Reports, champion: Champion) -> Verdict:
    recipe = session.recipe
    models = [step.name for step in recipe.steps if session.done[step.name].kind in MODELS]
    sizes = {name: model_size(manifest_of(session, name)) for name in models}
    if champion.size_bytes is not None and any(gate.against == CHAMPION for gate in recipe.gates):
        sizes[CHAMPION] = champion.size_bytes
    targets = {
        name: next((r["artifact_target"] for (a, _), r in reports.items() if a == name), None)
        for name in (recipe.judge.artifacts if recipe.judge else ())
    }
    return judge(recipe.gates, reports, sizes, targets)


def _engines(session: Session) -> dict[str, Executable]:
    executable = {step.name: step.executable for step in session.steps}
    found: dict[str, Executable] = {}
    for name in session.recipe.judge.artifacts if session.recipe.judge else ():
        step = session.done[name]
        if step.kind is Kind.ENGINE:
            target = _json(session.store, step.fingerprint, "engine.json")["target"]
            found[name] = Executable(fingerprint=step.fingerprint, target=target, judged=executable[name])
    return found


def _serves(engines: Mapping[str, Executable]) -> str:
    return next((name for name, engine in engines.items() if engine.judged), "")


def _beside(session: Session, serves: str, reports: Reports, champion: Champion) -> list[Compared]:
    if not serves:
        return []
    ours = {corpus: report["measures"] for (name, corpus), report in reports.items() if name == serves}
    theirs = {corpus: report["measures"] for corpus, report in champion.reports.items()}
    sizes = {"": {"size_bytes": float(model_size(manifest_of(session, serves)))}}
    served = {"": {"size_bytes": float(champion.size_bytes)}} if champion.size_bytes is not None else {}
    without = {corpus: {k: v for k, v in one.items() if k != "size_bytes"} for corpus, one in ours.items()}
    return compared({**without, **sizes}, {**theirs, **served})


def _json(store: Store, identity: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store.checkout(identity) / name).read_text(encoding="utf-8"))
    return found
