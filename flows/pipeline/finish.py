"""The end of a run: copies, report, MLflow, and the promotion last; then what can only be told of a promoted version.

Every part can be done again without harm. One that breaks before the promotion ends the run, and nothing is promoted.
From the journal's entry on nothing ends it: the record says at once what it came to, and what breaks then is told.
Only a registered model that does not answer as the judged engine makes the run a failed one after all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from flows.pipeline.figures import asked_items, chain, metrics, model_metrics, tags
from flows.pipeline.output_folder import (
    RECIPE,
    REPORT,
    RESULT,
    Copies,
    check_room,
    copied,
    copies_into,
)
from flows.pipeline.proof import proved
from flows.pipeline.verdict import Judgement
from flows.prefect_api.retry import AWAY_S, patiently
from flows.registry.journal import Candidate, head
from flows.registry.model_card import CARD, card
from flows.registry.projection import Registry, reconcile, release, versions
from flows.reporting.abilities import whereabouts
from flows.reporting.report import Drawn, curves_of, write_report
from flows.reporting.speed import speed_tables
from flows.results import ModelResult, RunResult
from flows.running.session import Session, manifest_of
from flows.tracking.model_metrics import log_model_metrics
from stages.runtime.contract import StageError
from stages.runtime.patience import BRIEFLY_S


def finish(session: Session, judgement: Judgement) -> RunResult:
    """End a judged run. To do it again does no harm: the same engines are registered and promoted once.

    Raises:
        StageError: a part before the promotion broke, as do other errors; nothing is promoted then.
        Unavailable: the store or MLflow does not answer; another try may help.
        KeyboardInterrupt: as it came; where the model is promoted by then, the record says so.
    """
    output = session.settings.output
    with copies_into(output) if output else nullcontext() as copies:
        candidate = _candidate(session, judgement)
        result = _result(session, judgement, candidate)
        _report(session, judgement, result)
        if copies:
            _copied(session, result, copies)
        _measured(session, judgement, result)
        if candidate is None:
            if copies:
                copies.place()
            session.record.finish(result)
            session.ended.append(result)
            return result
        result, note = _promoted(session, judgement, candidate, result)
        until = time.monotonic() + AWAY_S
        result = _proved(session, candidate, result, until)
        _completed(session, judgement, candidate, result, note, copies, until)
        return result


def _candidate(session: Session, judgement: Judgement) -> Candidate | None:
    """What is to be promoted; None where nothing is to be, a gate failed, or none was applied to what is served."""
    register = session.recipe.register_as
    if register is None or judgement.outcome != "passed":
        return None
    # Gates that a recipe has of it may not apply: to the right answers of a dense model that has none, for one.
    if judgement.serves and not any(one.applied and one.artifact == judgement.serves for one in judgement.gates):
        session.loose.heard(
            f"nothing is registered: no gate that applied speaks of {judgement.serves}, which would be served"
        )
        return None
    gates = [one.model_dump(mode="json") for one in judgement.gates]
    said = {"passed": True, "verdict": judgement.outcome, "gates": gates}
    candidate = Candidate(
        model=register.model,
        serves=judgement.serves,
        executables=dict(judgement.engines),
        verdict=said,
        run=session.mlflow.id,
    )
    candidate.check()
    return candidate


def _result(session: Session, judgement: Judgement, candidate: Candidate | None) -> RunResult:
    """What the run comes to; the version's number is empty until it stands."""
    model, register = None, session.recipe.register_as
    if candidate and register:
        targets = [target for target, status in candidate.targets.items() if status == "judged"]
        model = ModelResult(name=register.model, version="", alias=register.alias, targets=targets)
    return RunResult(
        run=session.record.name,
        passed=judgement.passed,
        verdict=judgement.outcome,
        seconds=round(time.monotonic() - session.started, 2),
        report=str(_page(session)),
        store=session.store.uri,
        steps=[session.done[name] for name in session.planned],
        gates=judgement.gates,
        model=model,
        executed=[f"{name} on {one.target}" for name, one in judgement.engines.items() if one.judged],
        compiled=[f"{name} for {other}" for name, one in judgement.engines.items() if (other := one.unexecuted)],
        outputs=_outputs(session, judgement),
        lost=whereabouts(judgement.reports, chain(session, judgement)),
    )


def _outputs(session: Session, judgement: Judgement) -> dict[str, str]:
    """What lies where: in the folder of --output, or else in the store."""
    names, into = copied(session.recipe), session.settings.output
    if into:
        return {name: str(into / name) for name in (REPORT, RECIPE, RESULT, *names)}
    found = {REPORT: str(_page(session))}
    judged = session.recipe.judge.artifacts if session.recipe.judge else names
    for name in judged:
        done = session.done[name]
        # What is promoted must be here; what else lies elsewhere is not brought for its address.
        here = name in judgement.engines or not session.store.objects.remote
        found[name] = str(session.store.checkout(done.fingerprint)) if here else done.uri
    return found


def _copied(session: Session, result: RunResult, copies: Copies) -> None:
    """Everything that --output asks for, so that what does not fit is known before anything is promoted."""
    names = copied(session.recipe)
    check_room(copies.folder, {name: manifest_of(session, name).size_bytes for name in names})
    for name in names:
        copies.add(session.store.checkout(session.done[name].fingerprint), name)
    copies.add(session.record.folder / RECIPE, RECIPE)
    copies.add(_page(session), REPORT)
    copies.conclude(result)


def _placed(session: Session, result: RunResult, copies: Copies) -> None:
    """Put the copies in place, with the version in report and result."""
    try:
        copies.add(_page(session), REPORT)
        copies.conclude(result)
    finally:
        copies.place()


def _report(session: Session, judgement: Judgement, result: RunResult) -> None:
    """The report in the record's folder."""
    manifests = {name: manifest_of(session, name) for name in session.planned}
    command = session.record.facts.get("command", [])
    curves = curves_of(session.store, manifests, session.record.events())
    page = _page(session)
    drawn = Drawn(curves, asked_items(session, judgement), speed_tables(judgement.speeds, judgement.reports))
    write_report(result, manifests, judgement.reports, session.record.recipe(), command, page, drawn=drawn)


def _measured(session: Session, judgement: Judgement, result: RunResult) -> None:
    """Figures, verdict and report in MLflow's run."""
    session.mlflow.summary(metrics(session, judgement, result), tags(result))
    session.mlflow.artifact(_page(session))


def _promoted(session: Session, judgement: Judgement, candidate: Candidate, result: RunResult) -> tuple[RunResult, str]:
    """Register and promote, and record the result with the version at once; also why nothing moved, if so."""
    model = result.model
    assert model is not None
    engine = session.store.checkout(candidate.executables[candidate.serves].fingerprint)
    run, champion = session.record.name, judgement.champion
    words = _card(session, judgement, candidate, result)
    registry, why = _registry(session), f"run {run} passed its gates"
    try:
        made = release(registry, candidate, engine, model.alias, against=champion.entry, why=why, card=words)
        result = _ended(session, result, made.version, "" if made.stands else made.note)
        return result, made.note
    except BaseException as error:
        # The entry may stand for all that: its answer was lost on the way, or a Ctrl-C came right behind it.
        version = _entered(session, candidate, model.alias)
        if not version:
            raise
        result = _ended(session, result, version)
        if not isinstance(error, Exception):
            raise
        return result, f"{model.name} version {version} is promoted; the store said so late ({error})"


def _card(session: Session, judgement: Judgement, candidate: Candidate, result: RunResult) -> str:
    items, champion = asked_items(session, judgement), judgement.champion.version
    return card(candidate, session.recipe.name, result, items, judgement.beside, champion)


def _entered(session: Session, candidate: Candidate, alias: str) -> str:
    """The version that this very run has promoted, empty where it has not or nobody can say."""
    try:
        entry = head(session.store.objects, candidate.model, alias)
    except (StageError, OSError):
        return ""
    return entry.version.number if entry and entry.candidate.run == candidate.run else ""


def _ended(session: Session, result: RunResult, version: str, undone: str = "") -> RunResult:
    """The result of a run whose model is registered, in memory and on record before anything else is done."""
    assert result.model is not None
    model = result.model.model_copy(update={"version": version, "undone": undone})
    result = result.model_copy(update={"model": model})
    session.ended.append(result)
    with session.loose.told("the record of the result", f"The report holds the same: {result.report}"):
        session.record.finish(result)
    return result


def _proved(session: Session, candidate: Candidate, result: RunResult, until: float) -> RunResult:
    """The alias follows, and the registered model is asked: from one that answers otherwise it goes back."""
    model, registry = result.model, _registry(session)
    assert model is not None
    unasked = f"{model.name} version {model.version} was not loaded and asked: the same recipe run again asks it."
    with session.loose.told("MLflow's alias", f"Run `enginery reconcile {model.name}`. {unasked}"):
        away_s = max(0, round(until - time.monotonic()))
        patiently(lambda: reconcile(registry, model.name), away_s=away_s, say=session.loose.heard)
        with session.loose.told("the registered model's answers", unasked):
            asked = patiently(
                lambda: proved(session, registry, candidate, result), away_s=BRIEFLY_S, say=session.loose.heard
            )
            if asked != result:
                result = asked
                session.ended.append(result)
                session.record.finish(result)
    return result


def _completed(
    session: Session,
    judgement: Judgement,
    candidate: Candidate,
    result: RunResult,
    note: str,
    copies: Copies | None,
    until: float,
) -> None:
    """Have MLflow, report and record follow a promotion; a service may be away `until` then, for all together."""
    model = result.model
    assert model is not None
    named = f"{model.name} version {model.version}"
    again = f"`enginery explain {result.run}` names {named}; the same recipe run again writes a whole report."

    def tagged() -> None:
        stands = {} if model.undone else {"enginery.version": f"{model.name} {model.version}"}
        session.mlflow.summary(tags={"enginery.verdict": result.verdict, **stands})
        session.mlflow.artifact(_page(session))

    def measured() -> None:
        client = session.mlflow.tracking.client
        client.log_text(session.mlflow.id, _card(session, judgement, candidate, result), CARD)
        carriers = [one.logged_model for one in versions(_registry(session), model.name) if one.number == model.version]
        for carrier in filter(None, carriers):
            log_model_metrics(client, session.mlflow.id, carrier, model_metrics(session, judgement))

    def recorded() -> None:
        if session.record.result is None:
            session.record.finish(result)

    parts: tuple[tuple[str, Callable[[], object], str], ...] = (
        ("the report with the version", lambda: _report(session, judgement, result), again),
        (
            f"the folder {session.settings.output}",
            lambda: _placed(session, result, copies) if copies else None,
            "The same command copies them again.",
        ),
        ("the version in MLflow's run", tagged, again),
        ("the card and the measures of MLflow's logged model", measured, again),
        ("the record of the result", recorded, f"The report holds the same: {result.report}"),
        ("the word on the version", lambda: session.terminal.line(note) if note else None, note),
    )
    for what, part, remedy in parts:
        with session.loose.told(what, remedy):
            patiently(part, away_s=max(0, round(until - time.monotonic())), say=session.loose.heard)


def _registry(session: Session) -> Registry:
    return Registry(session.store.objects, session.mlflow.tracking)


def _page(session: Session) -> Path:
    return session.record.folder / REPORT
