"""Whether each step can take what the steps before it will make: asked when a run is planned, before any work.

The question goes to a process of its own, so that no command loads torch; an answer is kept beside the store.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec

from flows.recipe.model import Recipe
from flows.running.child_environment import child_environment
from flows.running.plan import Planned
from stages import stage
from stages.admission import Answer, Asked
from stages.measures.table import MEASURES, SPEEDS, known
from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind, StageError
from stages.runtime.fingerprint import canonical, digest_bytes

KEPT = "admitted"
"""Folder beside the store of the answers to recipes whose every step was admitted."""
PATIENCE_S = 300


def refuse_inadmissible(
    planned: Mapping[str, Planned], recipe: Recipe, store: Store, say: Callable[[str], None]
) -> None:
    """Raise StageError where a step that is still to be made cannot do its work, naming each and what helps.

    Args:
        planned: the steps, pinned.
        recipe: whose gates are held against what the models are for.
        store: where sealed checkpoints lie, and answers are kept.
        say: told what could not be looked at.
    """
    # What reads an artifact of an earlier run knows more of it than can be known ahead of one that is to be made.
    planned = {name: one for name, one in planned.items() if not one.given}
    missing = [one for one in planned.values() if one.manifest is None and stage(one.order.stage).admit]
    if not any(one.after for one in missing):
        return
    kept = store.scratch / KEPT / f"{_key(planned, recipe)}.json"
    if kept.is_file():
        return
    if find_spec("torch") is None:
        say("what the steps can take is not looked at: torch is not installed here")
        return
    try:
        answers = {one.step: one for one in ask([_asked(one, store) for one in planned.values()])}
    except (StageError, subprocess.TimeoutExpired) as error:
        say(f"what the steps can take could not be looked at: {error}")
        return
    for name, answer in answers.items():
        if answer.unknown:
            say(f"{name}: what it can take could not be looked at ({answer.unknown})")
    refused = [*_refusals(planned, answers), *_gates(planned, recipe, answers)]
    if refused:
        raise _together(refused)
    if any(answer.unknown for answer in answers.values()):
        return  # it is said again the next time
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("{}", encoding="utf-8")


def ask(steps: Sequence[Asked]) -> list[Answer]:
    """The steps' answers, from a process that may load torch; from this one where it is loaded already.

    Raises:
        StageError: the process broke.
    """
    if "transformers" in sys.modules:
        from stages.admission import admitted

        return admitted(steps)
    request = json.dumps([one.model_dump(mode="json") for one in steps])
    done = subprocess.run(
        [sys.executable, "-m", "stages.admission"],
        input=request,
        env=child_environment("fetch", 1) | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise StageError(
            "what the steps can take could not be looked at",
            measured=f"exit code {done.returncode}: {last}",
            remedy="This is a defect: please report it with the recipe.",
        )
    return [Answer.model_validate(one) for one in json.loads(done.stdout)]


def _key(planned: Mapping[str, Planned], recipe: Recipe) -> str:
    gates = [gate.model_dump(mode="json") for gate in recipe.gates]
    return digest_bytes(canonical([{name: one.identity for name, one in planned.items()}, gates]))


def _asked(one: Planned, store: Store) -> Asked:
    order = one.order
    sealed = one.manifest is not None and one.manifest.kind is Kind.CHECKPOINT and not one.after
    return Asked(
        name=one.name,
        stage=order.stage,
        params=order.params.model_dump(mode="json"),
        inputs=dict(one.roles),
        folder=str(store.checkout(one.identity)) if sealed and not store.objects.remote else "",
    )


def refusal(whose: str, parts: Mapping[str, str | None]) -> StageError:
    """What a step was refused with, as an error that begins with whose it is."""
    return StageError(
        f"{whose}: {parts['what']}" if whose else parts["what"] or "",
        measured=parts["measured"],
        limit=parts["limit"],
        remedy=parts["remedy"] or "",
    )


def _refusals(planned: Mapping[str, Planned], answers: Mapping[str, Answer]) -> Iterable[StageError]:
    """What each step was refused with; steps that are refused alike stand together."""
    alike: dict[str, list[Answer]] = {}
    for one in answers.values():
        if one.refusal and planned[one.step].manifest is None:
            alike.setdefault(f"{planned[one.step].order.stage} {sorted(one.refusal.items())}", []).append(one)
    for first, *others in alike.values():
        assert first.refusal is not None
        names = ", ".join(repr(one.step) for one in (first, *others))
        what = f"step{'s' if others else ''} {names} ({planned[first.step].order.stage})"
        yield refusal(what, first.refusal)


def _gates(planned: Mapping[str, Planned], recipe: Recipe, answers: Mapping[str, Answer]) -> Iterable[StageError]:
    """The gates on a measure that says nothing of the model that is judged."""
    judged = recipe.judge.artifacts if recipe.judge else []
    for gate in recipe.gates:
        table = SPEEDS if gate.measure in SPEEDS else MEASURES
        measure = SPEEDS.get(gate.measure) or known(gate.measure)
        for name, one in planned.items():
            task = answers[name].task
            if measure is None or not one.measures or not task or task in measure.tasks:
                continue
            if one.measures in ([gate.artifact] if gate.artifact else judged):
                fitting = ", ".join(other for other, its in table.items() if task in its.tasks)
                yield StageError(
                    f"a gate asks for {gate.measure} of {one.measures}, which is not measured of a model of its task",
                    measured=f"its task is {task}",
                    limit=fitting,
                    remedy=f"Gate on one of these: {fitting}.",
                )
                break


def _together(refused: Sequence[StageError]) -> StageError:
    """One error of one or several."""
    if len(refused) == 1:
        return refused[0]
    lines = "".join(f"\n  {one}" for one in refused)
    return StageError(f"{len(refused)} things keep this recipe from running, and nothing was begun:{lines}")
