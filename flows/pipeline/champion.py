"""The champion: the version that a recipe's alias stands on. What a gate asks of it is measured like anything else.

It is an engine that is sealed already: a run measures it on its own texts, windows and baseline, so that a report made
before is taken only where it is of the same work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.recipe.expand import Expanded, PlannedStep
from flows.recipe.model import CHAMPION, Recipe
from flows.registry.journal import Executable, Promotion, history, last, standing_entry
from flows.running.placement import devices
from flows.running.plan import resolve
from flows.running.session import Session, model_size, run_step
from stages.adapters.targets import is_plan
from stages.measures.table import BENCH
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import fingerprint


@dataclass(frozen=True)
class Champion:
    """What the alias stands on.

    Attributes:
        entry: number of the alias's last entry in the journal, 0 for none: a verdict holds against it and no other.
        stands: the entry that the alias stands on, None for no champion.
    """

    entry: int = 0
    stands: Promotion | None = None

    @property
    def version(self) -> str:
        """Its number, empty for none."""
        return self.stands.version.number if self.stands else ""

    @property
    def served(self) -> Executable | None:
        """The engine that it serves."""
        return self.stands.candidate.executables[self.stands.candidate.serves] if self.stands else None


def champion_of(recipe: Recipe, store: Store) -> Champion:
    """The version that a recipe's alias stands on now."""
    if (register := recipe.register_as) is None:
        return Champion()
    entries = history(store.objects, register.model, register.alias)
    return Champion(last(entries), standing_entry(entries))


@dataclass(frozen=True)
class MeasuredChampion(PlannedStep):
    """A measurement of the champion, whose engine is known by now."""


def facing(asked: Expanded, store: Store) -> Sequence[PlannedStep]:
    """A recipe's steps and the measurements of the champion that its gates ask for.

    Raises:
        StageError: a gate compares with a champion whose engine is gone.
    """
    return _facing(asked, store, champion_of(asked.recipe, store))


def measured(session: Session, champion: Champion) -> Session:
    """The session with the champion measured as the gates ask; another one than was planned for is measured now.

    Raises:
        StageError: its engine is gone, or cannot be measured.
    """
    steps = _facing(session.asked, session.store, champion)
    if [(one.name, dict(one.given)) for one in steps] == [(one.name, dict(one.given)) for one in session.steps]:
        return session
    own = {name: one for name, one in session.planned.items() if one.measures != CHAMPION}
    theirs = [step for step in steps if step.measures == CHAMPION]
    there = devices(session.settings)
    planned = resolve(theirs, session.store, session.terminal.for_step, devices=there, known=own)
    session = replace(session, steps=steps, planned=planned)
    for step in theirs:
        run_step(session, step.name)
    return session


def size_of(champion: Champion, store: Store) -> int | None:
    """Bytes of the champion's engine, None where there is none or it is not in the store."""
    manifest = store.manifest(champion.served.fingerprint) if champion.served else None
    return model_size(manifest) if manifest else None


def reports_of(session: Session, champion: Champion, serves: str) -> dict[str, dict[str, Any]]:
    """Corpus -> the champion's report of the same work as this run's, as far as there is one.

    Args:
        session: whose measurements of the champion are taken first.
        champion: the version.
        serves: the step beside whose measurements the champion's stand, where no gate asked for them.
    """
    if champion.served is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for step in session.steps:
        if step.measures not in (CHAMPION, serves) or step.stage == BENCH or step.corpus in found:
            continue
        work = session.planned[step.name].order.work
        identity = fingerprint(
            work.model_copy(update={"inputs": {**work.inputs, "model": champion.served.fingerprint}})
        )
        if session.store.manifest(identity):
            found[step.corpus] = _report(session.store, identity)
    return found


def _facing(asked: Expanded, store: Store, champion: Champion) -> Sequence[PlannedStep]:
    served, register = champion.served, asked.recipe.register_as
    if served is None or register is None:
        return asked.steps
    compares = any(gate.against == CHAMPION for gate in asked.recipe.gates)
    if compares and store.manifest(served.fingerprint) is None:
        raise StageError(
            f"the engine of {register.model}@{register.alias}, version {champion.version}, is not in {store.uri}, so "
            "no gate can compare with it",
            measured=f"artifact {served.fingerprint[:12]} is gone",
            remedy=f"Run the recipe that made it again, move the alias by `enginery promote {register.model} VERSION` "
            "to a version whose engine is there, or take the gates against champion out.",
        )
    if compares and is_plan(served.target) and served.target.partition(":")[2] != asked.gpu:
        raise StageError(
            f"{register.model}@{register.alias}, version {champion.version}, is a plan that no GPU here executes, so "
            "no gate can compare with it",
            measured=asked.gpu or "no GPU",
            limit=served.target,
            remedy="Run it on a machine with such a GPU, or take the gates against champion out.",
        )
    theirs = [
        MeasuredChampion(
            name=one.name,
            stage=one.stage,
            inputs=one.inputs,
            params={**one.params, "target": served.target},
            measures=one.measures,
            corpus=one.corpus,
            given={"model": served.fingerprint},
        )
        for one in asked.champion
    ]
    return (*asked.steps, *theirs)


def _report(store: Store, identity: str) -> dict[str, Any]:
    found: Mapping[str, Any] = json.loads((store.checkout(identity) / "report.json").read_text(encoding="utf-8"))
    return dict(found)
