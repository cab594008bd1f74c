"""After a promotion: the registered model is loaded as users load it, and must answer as the engine that was judged."""

from __future__ import annotations

from flows.registry.asking import TEXTS, alike, engines_answers, questions, registered_answers
from flows.registry.journal import JOURNAL, Candidate, Promotion, head
from flows.registry.projection import Registry, undo
from flows.results import GateResult, RunResult, run_verdict
from flows.running.session import Session
from stages.runtime.contract import StageError

MEASURE = "registered_answers"
"""What a run says that it held: how many texts the registered model answers as the judged engine does."""


def proved(session: Session, registry: Registry, candidate: Candidate, result: RunResult) -> RunResult:
    """The result once the registered model has answered; where it answers otherwise, its alias goes back.

    What has answered once is not asked again: a note beside the journal's entry says so.

    Raises:
        StageError: it could not be asked.
        Unavailable: MLflow does not answer.
    """
    model = result.model
    assert model is not None
    entry = head(session.store.objects, model.name, model.alias)
    if entry is None or (entry.version.number, entry.candidate.identity) != (model.version, candidate.identity):
        return result  # the alias stands elsewhere, and somebody has said why
    noted = f"{JOURNAL}{model.name}/{entry.number:08d}.asked.json"
    if session.store.objects.stat(noted):
        return result
    equal, asked, wrong = _asked(session, registry, entry)
    if not wrong:
        session.store.objects.put(noted, b"{}")
        said = f"{model.name}@{model.alias} was loaded anew and answers {equal} of {asked} texts as the judged engine"
        session.loose.heard(said)
        return result
    return _taken_back(session, registry, entry, result, _gate(entry, equal, asked, wrong))


def _asked(session: Session, registry: Registry, entry: Promotion) -> tuple[int, int, str]:
    """How many of how many texts are answered alike, and what is wrong, empty for nothing."""
    judge, served = session.recipe.judge, entry.candidate.executables[entry.candidate.serves]
    assert judge is not None
    corpora = [session.store.checkout(session.done[name].fingerprint) for name in judge.corpora]
    texts, ours = engines_answers(session.store.checkout(served.fingerprint), questions(corpora, judge.split))
    carrier, theirs = registered_answers(registry.tracking, entry.candidate.model, entry.alias, texts)
    if carrier and carrier != entry.version.logged_model:
        raise StageError(
            f"{entry.candidate.model}@{entry.alias} is in MLflow on another version than the journal says",
            measured=f"it loads {carrier}",
            limit=entry.version.logged_model,
            remedy=f"`enginery reconcile {entry.candidate.model}` puts it back.",
        )
    if isinstance(theirs, str):
        return 0, len(texts), theirs
    equal = alike(ours, theirs)
    return equal, len(texts), "" if equal == len(texts) == len(theirs) else "it answers otherwise"


def _gate(entry: Promotion, equal: int, asked: int, wrong: str) -> GateResult:
    served = entry.candidate.executables[entry.candidate.serves]
    named = f"{entry.candidate.model} version {entry.version.number}"
    text = f"the registered {named}, loaded anew: {wrong}; {equal} of {asked} texts answered as by the judged engine"
    return GateResult(
        measure=MEASURE,
        artifact=entry.candidate.serves,
        target=served.target,
        corpus="",
        measured=float(equal),
        bound="at_least",
        limit=float(asked or TEXTS),
        passed=False,
        text=f"{text}, limit at least {asked or TEXTS}: FAILED",
    )


def _taken_back(
    session: Session, registry: Registry, entry: Promotion, result: RunResult, gate: GateResult
) -> RunResult:
    assert result.model is not None
    gates = [*result.gates, gate]
    why = f"run {result.run}: {gate.text.removesuffix(': FAILED')}"
    back = undo(registry, entry, why)
    if back is None:
        undone = f"{entry.alias} had moved on by then"
    else:
        undone = f"{entry.alias} went back to {f'version {back}' if back else 'no version: there was none before'}"
    session.loose.heard(f"{gate.text}; {undone}")
    model = result.model.model_copy(update={"undone": undone})
    return result.model_copy(update={"gates": gates, "passed": False, "verdict": run_verdict(gates), "model": model})
