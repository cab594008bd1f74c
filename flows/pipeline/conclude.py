"""The end of a run: the verdict, the registered version and its card, the report, what MLflow and the record keep."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.judging.gates import CHAMPION, Verdict, judge
from flows.registry.journal import Candidate, Executable, head
from flows.registry.model_card import Compared, card, compared
from flows.registry.projection import Registry, release
from flows.reporting.report import curves_of, write_report
from flows.results import GateResult, ModelResult, RunResult
from flows.running.session import MODELS, Session, manifest_of, model_size
from stages.runtime.contract import Kind

Reports = dict[tuple[str, str], dict[str, Any]]


def conclude(session: Session) -> RunResult:
    """Judge, register, report and record what the steps made. To do it again does no harm."""
    champion = _champion(session)
    verdict, reports = _judged(session, champion)
    engines = _engines(session)
    passed = verdict.passed if verdict else True
    report = session.record.folder / "report.html"
    serves = next((name for name, engine in engines.items() if engine.judged), "")
    beside = _beside(session, serves, reports, champion)
    model = _registered(session, verdict, engines, beside, champion) if verdict and passed else None
    result = RunResult(
        run=session.record.name,
        passed=passed,
        seconds=round(time.monotonic() - session.started, 2),
        report=str(report),
        store=session.store.uri,
        steps=[session.done[name] for name in session.planned],
        gates=[_gate(one) for one in verdict.results] if verdict else [],
        model=model,
        executed=[f"{name} on {one.target}" for name, one in engines.items() if one.judged],
        compiled=[f"{name} for {one.target}" for name, one in engines.items() if not one.judged],
        outputs=_outputs(session, engines, report),
    )
    manifests = {name: manifest_of(session, name) for name in session.planned}
    command = session.record.facts.get("command", [])
    curves = curves_of(session.store, manifests, session.record.events())
    write_report(result, manifests, reports, session.record.recipe(), command, report, curves=curves)
    _tell_mlflow(session, result, report, beside)
    session.record.finish(result)
    return result


@dataclass(frozen=True)
class Champion:
    """The version that the alias stands on, as far as it is known here.

    Attributes:
        version: its number, empty for none.
        reports: corpus -> report of the engine that it serves.
        size_bytes: of that engine, None where it is not in the store.
    """

    version: str = ""
    reports: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    size_bytes: int | None = None


def _champion(session: Session) -> Champion:
    """The version now served, its reports found by its fingerprint among those on the same corpora."""
    register, judged = session.recipe.register_as, session.recipe.judge
    entry = head(session.store.objects, register.model, register.alias) if register else None
    if entry is None or judged is None:
        return Champion()
    served = entry.candidate.executables[entry.candidate.serves].fingerprint
    made = session.store.manifest(served)
    corpora = {session.done[name].fingerprint: name for name in judged.corpora}
    reports = {}
    for identity, manifest in session.store.manifests():
        inputs = manifest.work.inputs
        if manifest.kind is Kind.REPORT and inputs.get("model") == served and inputs.get("text") in corpora:
            folder = session.store.checkout(identity)
            reports[corpora[inputs["text"]]] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Champion(entry.version.number, reports, model_size(made) if made else None)


def _judged(session: Session, champion: Champion) -> tuple[Verdict | None, Reports]:
    """The verdict over all gates, and every report by (artifact, corpus)."""
    recipe = session.recipe
    reports: Reports = {}
    for step in session.steps:
        if step.measures:
            folder = session.store.checkout(session.done[step.name].fingerprint)
            reports[step.measures, step.corpus] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if recipe.judge is None:
        return None, reports
    models = [step.name for step in recipe.steps if session.done[step.name].kind in MODELS]
    sizes = {name: model_size(manifest_of(session, name)) for name in models}
    targets = {
        name: next((r["artifact_target"] for (a, _), r in reports.items() if a == name), None)
        for name in recipe.judge.artifacts
    }
    if any(gate.against == CHAMPION for gate in recipe.gates):
        reports |= {(CHAMPION, corpus): report for corpus, report in champion.reports.items()}
        if champion.size_bytes is not None:
            sizes[CHAMPION] = champion.size_bytes
    return judge(recipe.gates, reports, sizes, targets), reports


def _beside(session: Session, serves: str, reports: Reports, champion: Champion) -> list[Compared]:
    """The measures of the engine that is served, beside the champion's."""
    if not serves:
        return []
    ours = {corpus: report["measures"] for (name, corpus), report in reports.items() if name == serves}
    theirs = {corpus: report["measures"] for corpus, report in champion.reports.items()}
    sizes = {"": {"size_bytes": float(model_size(manifest_of(session, serves)))}}
    served = {"": {"size_bytes": float(champion.size_bytes)}} if champion.size_bytes is not None else {}
    without = {corpus: {k: v for k, v in one.items() if k != "size_bytes"} for corpus, one in ours.items()}
    return compared({**without, **sizes}, {**theirs, **served})


def _engines(session: Session) -> dict[str, Executable]:
    """Every engine that is judged or asked to be, with what may be said of it."""
    judged = session.recipe.judge
    found: dict[str, Executable] = {}
    for name in judged.artifacts if judged else ():
        step = session.done[name]
        if step.kind is Kind.ENGINE:
            folder = session.store.checkout(step.fingerprint)
            target = json.loads((folder / "engine.json").read_text(encoding="utf-8"))["target"]
            executed = next(one.executable for one in session.steps if one.name == name)
            found[name] = Executable(fingerprint=step.fingerprint, target=target, judged=executed)
    return found


def _registered(
    session: Session,
    verdict: Verdict,
    engines: Mapping[str, Executable],
    beside: list[Compared],
    champion: Champion,
) -> ModelResult | None:
    register = session.recipe.register_as
    if register is None:
        return None
    serves = next((name for name, engine in engines.items() if engine.judged), "")
    gates = [_gate(one) for one in verdict.results]
    said = {"passed": verdict.passed, "gates": [one.model_dump(mode="json") for one in gates]}
    candidate = Candidate(
        model=register.model, serves=serves, executables=dict(engines), verdict=said, run=session.mlflow.id
    )
    candidate.check()
    engine = session.store.checkout(engines[serves].fingerprint)
    registry = Registry(session.store.objects, session.tracking)
    steps = [session.done[name] for name in session.planned]
    told = card(candidate, session.recipe.name, session.record.name, steps, gates, beside, champion.version)
    why = f"run {session.record.name} passed its gates"
    made = release(registry, candidate, engine, register.alias, why=why, card=told)
    if made.note:
        session.terminal.line(made.note)
    return ModelResult(
        name=register.model,
        version=made.version,
        alias=register.alias,
        targets=[target for target, status in candidate.targets.items() if status == "judged"],
    )


def _gate(one: Any) -> GateResult:
    return GateResult(
        measure=one.measure,
        artifact=one.artifact,
        target=one.target,
        corpus=one.corpus,
        measured=one.measured,
        limit=one.limit,
        passed=one.passed,
        against=one.against,
        low=one.low,
        high=one.high,
        text=one.text,
    )


def _outputs(session: Session, engines: Mapping[str, Executable], report: Path) -> dict[str, str]:
    """What lies where; with --output, copies that one may move and change."""
    found = {"report": str(report)}
    into = session.settings.output
    names = list(engines) or [session.recipe.steps[-1].name]
    for name in names:
        view = session.store.checkout(session.done[name].fingerprint)
        found[name] = str(view)
        if into is not None:
            folder = into / name
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(view.rglob("*")):
                if path.is_file():
                    copy = folder / path.relative_to(view)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.unlink(missing_ok=True)
                    shutil.copyfile(path, copy)
            found[name] = str(folder)
    return found


def _tell_mlflow(session: Session, result: RunResult, report: Path, beside: list[Compared]) -> None:
    metrics = {"seconds": result.seconds, **{one.key: one.challenger for one in beside}}
    metrics |= {f"champion.{one.key}": one.champion for one in beside if one.champion is not None}
    for gate in result.gates:
        if gate.measured is not None:
            key = ".".join(filter(None, ["gate", gate.measure, gate.artifact, gate.corpus]))
            metrics[key] = gate.measured
    tags = {
        "enginery.verdict": "passed" if result.passed else "failed",
        "enginery.executed": ", ".join(result.executed),
        "enginery.compiled": ", ".join(result.compiled),
    }
    if result.model:
        tags["enginery.version"] = f"{result.model.name} {result.model.version}"
    session.mlflow.summary(metrics, tags)
    session.mlflow.artifact(report)
