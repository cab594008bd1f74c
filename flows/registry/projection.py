"""MLflow's registered versions and aliases: a projection of the promotion journal, reconciled until it equals it.

MLflow's aliases are last-writer-wins and can be moved by hand, so they decide nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.names import alias_fault, checked_alias
from flows.registry.announce import tell
from flows.registry.going_back import before, standing, why_not
from flows.registry.journal import (
    Action,
    Candidate,
    Overtaken,
    Promotion,
    Version,
    append,
    head,
    history,
    refuse_overtaken,
)
from flows.registry.mlflow_versions import CANDIDATE, CARRIER, aliases, create_version
from flows.registry.package import logged_model, refilled
from flows.tracking.connect import Tracking
from stages.runtime.contract import StageError
from stages.runtime.stores import Objects

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


@dataclass(frozen=True)
class Registry:
    """The journal in `objects` and its projection in MLflow."""

    objects: Objects
    tracking: Tracking

    @property
    def client(self) -> MlflowClient:
        """MLflow's client."""
        return self.tracking.client


@dataclass(frozen=True)
class Release:
    """What a promotion or a rollback came to.

    Attributes:
        version: the number that the alias stands on, or that was asked for and not promoted (see `note`).
        new: the version was registered now.
        moved: the journal has a new entry.
        note: why nothing moved, or what a rollback passed over; empty otherwise.
        stands: the alias stands on it, now or since before.
    """

    version: str
    logged_model: str
    new: bool
    moved: bool
    note: str
    stands: bool = True


@dataclass(frozen=True)
class Drift:
    """An alias in MLflow that is not what the journal says. None: it stands on nothing there."""

    model: str
    alias: str
    journal: str | None
    found: str | None


def release(
    registry: Registry, candidate: Candidate, engine: Path, alias: str, *, against: int, why: str = "", card: str = ""
) -> Release:
    """Register a candidate, once for the same engines, and enter it in the journal unless a person did away with it.

    From the entry on it is promoted: `reconcile` makes MLflow's alias follow, now or whenever it is asked to.

    Args:
        registry: journal and MLflow.
        candidate: what passed.
        engine: verified folder of the executable it serves.
        alias: to move.
        against: number of the alias's entry that its verdict holds against, 0 for none.
        why: for the journal.
        card: what people read of the version, in Markdown.

    Raises:
        Overtaken: the alias has moved since; nothing is promoted.
        StageError: it did not pass, or what it serves was not judged; nothing is registered then.
        Unavailable: MLflow does not answer.
    """
    checked_alias(alias)
    candidate.check()
    if version := _of_identity(registry, candidate):
        mended = refilled(registry.tracking, engine, version.logged_model, candidate.run)
        made = _entered(registry, version, alias, why, new=False, against=against)
        notes = [
            made.note,
            f"version {version.number} had lost its files in MLflow, and has them again" if mended else "",
        ]
        return replace(made, note="; ".join(filter(None, notes)))
    served = candidate.executables[candidate.serves]
    carrier = logged_model(registry.tracking, engine, candidate.model, served.fingerprint, candidate.run)
    # An engine takes its time to get there, and no version is to stand that lost to another one meanwhile.
    refuse_overtaken(history(registry.objects, candidate.model, alias), against)
    version, new = _register(registry, candidate, carrier, card)
    try:
        return _entered(registry, version, alias, why, new=new, against=against)
    except Overtaken:
        if new:
            registry.client.delete_model_version(candidate.model, version.number)
        raise


def promote(registry: Registry, model: str, number: str, alias: str, why: str = "") -> Release:
    """Make an alias stand on a registered version because a person says so, even one that was rolled back or left.

    No run has the alias stand again on the engine that it leaves, until a person promotes that one.

    Raises:
        StageError: there is no such version, or no recipe registered it.
        Unavailable: MLflow does not answer.
    """
    version = next((one for one in versions(registry, model) if one.number == number), None)
    if version is None:
        have = ", ".join(one.number for one in versions(registry, model))
        raise StageError(
            f"no recipe registered version {number or repr(number)} of {model}",
            measured=f"registered: {have or 'no version'}",
            remedy="`enginery models` lists what there is.",
        )
    made = _entered(registry, version, alias, why, new=False, against=None)
    reconcile(registry, model)
    return made


def rollback(registry: Registry, model: str, alias: str, why: str = "") -> Release:
    """Append an entry that points to what the alias stood on before the version it stands on now.

    What was rolled back before is passed over, and the note says so.

    Raises:
        StageError: nothing stood before that was not rolled back, or the registry has lost it.
        Unavailable: MLflow does not answer.
    """
    note = ""

    def chosen(entries: list[Promotion]) -> Version:
        nonlocal note
        version, passed = before(entries)
        undone = ", ".join(dict.fromkeys(one.number for one in passed))
        if version is None:
            stood = f"{len(standing(entries))} promoted"
            raise StageError(
                f"{model}@{alias} has no version to go back to",
                measured=f"before it stood version {undone}, which was rolled back" if passed else stood,
                limit="one that stood before and was not rolled back" if passed else "2 promoted",
                remedy=f"`enginery promote {model} VERSION` moves the alias to any registered version.",
            )
        _check_present(registry, version)
        note = f"passed over what was rolled back before: version {undone}" if passed else ""
        return version

    entry = append(registry.objects, model, alias, "rollback", chosen, why)
    assert entry is not None
    reconcile(registry, model)
    return Release(entry.version.number, entry.version.logged_model, new=False, moved=True, note=note)


def undo(registry: Registry, entry: Promotion, why: str) -> str | None:
    """Take a run's own promotion back: the alias stands where it stood before, or nowhere if it never did.

    Returns:
        The number that it stands on then, empty for none; None where it has moved on since.

    Raises:
        Unavailable: MLflow does not answer.
    """
    model, alias = entry.candidate.model, entry.alias
    stack = standing(history(registry.objects, model, alias))
    known = versions(registry, model)
    stood = [one for one in stack[:-1][-1:] if any(two.same(one) for two in known)]
    action: Action = "rollback" if stood else "withdraw"
    stands = stood[0] if stood else entry.version
    try:
        append(registry.objects, model, alias, action, lambda _: stands, why, entry.number)
    except Overtaken:
        return None
    reconcile(registry, model)
    return stands.number if stood else ""


def reconcile(registry: Registry, model: str) -> list[Drift]:
    """Make MLflow's aliases equal the journal and tell subscribers of it; returns what was put right.

    Raises:
        StageError: the registry has lost a version that an alias must stand on.
        Unavailable: MLflow does not answer.
    """
    mended: list[Drift] = []
    while wrong := drift(registry, model):
        for one in wrong:
            entry = head(registry.objects, model, one.alias)
            if entry is None:
                registry.client.delete_registered_model_alias(model, one.alias)
                continue
            _check_present(registry, entry.version)
            registry.client.set_registered_model_alias(model, one.alias, entry.version.number)
        mended += wrong  # and look again: another process may have appended meanwhile
    tell(registry.objects, model)
    return mended


def drift(registry: Registry, model: str) -> list[Drift]:
    """Aliases of the journal that MLflow has elsewhere: moved by hand, or not moved yet; see `refused` for the rest."""
    entries = [entry for entry in history(registry.objects, model) if not alias_fault(entry.alias)]
    should = {one.alias: None if one.action == "withdraw" else one.version.number for one in entries}
    stands = aliases(registry.client, model) or {}
    return [Drift(model, alias, n, stands.get(alias)) for alias, n in should.items() if stands.get(alias) != n]


def refused(objects: Objects, model: str) -> list[str]:
    """What the journal says of aliases that MLflow cannot have, with a way on; no entry can be made so any more."""
    stands = {entry.alias: entry.version.number for entry in history(objects, model)}
    return [
        f"{model}@{alias}: left alone on version {number}, since {fault}; "
        f"`enginery promote {model} {number}` makes champion stand on it, with --alias another one"
        for alias, number in stands.items()
        if (fault := alias_fault(alias))
    ]


def versions(registry: Registry, model: str) -> list[Version]:
    """The versions that recipes registered, lowest number first."""
    found = registry.client.search_model_versions(f"name = '{model}'")
    ours = [one for one in found if CANDIDATE in one.tags]
    return [
        Version(
            number=str(one.version),
            logged_model=one.tags.get(CARRIER, ""),
            candidate=Candidate.model_validate_json(one.tags[CANDIDATE]),
        )
        for one in sorted(ours, key=lambda one: int(one.version))
    ]


def _entered(registry: Registry, version: Version, alias: str, why: str, *, new: bool, against: int | None) -> Release:
    note, stands = "", True

    def chosen(entries: list[Promotion]) -> Version | None:
        nonlocal note, stands
        note, stands = why_not(entries, version, by_person=against is None)
        return None if note else version

    entry = append(registry.objects, version.candidate.model, alias, "promote", chosen, why, against)
    return Release(version.number, version.logged_model, new, moved=entry is not None, note=note, stands=stands)


def _register(registry: Registry, candidate: Candidate, carrier: LoggedModel, card: str) -> tuple[Version, bool]:
    """A version of these engines, and whether it was made now.

    MLflow has no put-if-absent: of several versions of the same engines the lowest number stays, the rest go.
    """
    made = create_version(registry.client, candidate, carrier, card)
    first = _of_identity(registry, candidate)
    assert first is not None
    new = first.number == made
    if not new:
        registry.client.delete_model_version(candidate.model, made)
    return first, new


def _of_identity(registry: Registry, candidate: Candidate) -> Version | None:
    """The lowest version of the same engines; the journal's record of it is this candidate's, with its verdict."""
    for version in versions(registry, candidate.model):
        if version.candidate.identity == candidate.identity:
            return version.model_copy(update={"candidate": candidate})
    return None


def _check_present(registry: Registry, version: Version) -> None:
    stands = any(one.same(version) for one in versions(registry, version.candidate.model))
    if not stands:
        raise StageError(
            f"MLflow has lost version {version.number} of {version.candidate.model}, which the journal promoted",
            remedy="Run its recipe again: what is sealed is registered anew and promoted.",
        )
