"""The promotion journal: `promotions/<model>/<n>.json` in the store, put if absent, never changed. It is the truth.

Every model has one journal for all its aliases. An entry says on which version an alias stands from then on.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from flows.names import checked_alias
from stages.runtime.contract import Frozen, StageError
from stages.runtime.fingerprint import canonical, digest_bytes
from stages.runtime.stores import Objects

JOURNAL = "promotions/"
COMPILED = "compiled, not judged"
Action = Literal["promote", "rollback", "withdraw"]
_BY_RUN = re.compile(r"run \S+ (passed its gates$|was promoted without a gate)")
"""Why a run promoted, in entries that do not say against what."""


class Overtaken(StageError):
    """An alias has moved since the verdict that was to move it: it holds against another champion."""


class Executable(Frozen):
    """An engine that a recipe compiled.

    Attributes:
        target: what executed it, or, where nothing did, all that it was compiled for.
        judged: it was executed.
        besides: what else a plan was compiled for, which nobody executed: `tensorrt_rtx:sm_120`; empty for nothing.
    """

    fingerprint: str
    target: str
    judged: bool
    besides: str = ""

    @property
    def status(self) -> str:
        """What may be said of it on its target."""
        return "judged" if self.judged else COMPILED

    @property
    def unexecuted(self) -> str:
        """What it was compiled for and nobody executed, empty for nothing."""
        return self.besides if self.judged else self.target

    @property
    def statuses(self) -> dict[str, str]:
        """Target -> what may be said of it there."""
        return {self.target: self.status} | ({self.besides: COMPILED} if self.besides else {})


class Candidate(Frozen):
    """What may be promoted.

    Attributes:
        model: registered name.
        serves: the key in `executables` of the one that an alias serves; it must have been judged.
        executables: step name -> engine.
        verdict: `passed` and the gates' results, as JSON values.
        run: MLflow's run that made it.
    """

    model: str
    serves: str
    executables: dict[str, Executable]
    verdict: dict[str, Any]
    run: str

    @property
    def identity(self) -> str:
        """Equal for the same engines of which the same is served, whatever gates they held and steps are called."""
        engines = sorted(one.fingerprint for one in self.executables.values())
        return digest_bytes(canonical([self.model, self.served, engines]))

    @property
    def served(self) -> str:
        """The fingerprint of the engine that an alias serves."""
        one = self.executables.get(self.serves)
        return one.fingerprint if one else ""

    @property
    def targets(self) -> dict[str, str]:
        """Target -> `judged` or `compiled, not judged`."""
        return {target: status for one in self.executables.values() for target, status in one.statuses.items()}

    def check(self) -> None:
        """Raise StageError unless it passed its gates and the engine it serves was executed."""
        if self.verdict.get("passed") is not True:
            raise StageError(f"{self.model} did not hold its gates", remedy="Nothing is registered, no alias moves.")
        served = self.executables.get(self.serves)
        if served is None or not served.judged:
            raise StageError(
                f"an alias of {self.model} cannot serve {self.serves}",
                measured=served.status if served else "no such engine",
                limit="judged",
                remedy="Judge an engine on the target that executes it, such as onnxruntime:cpu.",
            )


class Version(Frozen):
    """A registered version: its number in MLflow, the logged model it loads, what it is."""

    number: str
    logged_model: str
    candidate: Candidate

    def same(self, other: Version) -> bool:
        """The same engines under the same number; a rebuilt registry counts afresh."""
        return (self.number, self.candidate.identity) == (other.number, other.candidate.identity)


class Promotion(Frozen):
    """One entry: from here on `alias` stands on `version`; after `withdraw` on nothing, for nothing stood before it.

    Attributes:
        previous: number of the version that it stood on before.
        against: of a run's entry the number of the alias's entry that it was judged against, 0 for none; None where a
            person decided, and in entries from before there was the field.
    """

    number: int
    action: Action
    alias: str
    version: Version
    previous: str | None
    who: str
    why: str
    when: str
    against: int | None = None

    @property
    def by_person(self) -> bool:
        """Whether a person asked for it, and no run."""
        return self.against is None and not _BY_RUN.match(self.why)

    @property
    def candidate(self) -> Candidate:
        """What stands there."""
        return self.version.candidate


def history(objects: Objects, model: str, alias: str | None = None) -> list[Promotion]:
    """The entries of a model's journal, or those of one alias, oldest first.

    Raises:
        StageError: one of them is damaged, so that nobody can say where an alias stands.
    """
    found = []
    for entry in objects.list(f"{JOURNAL}{model}/"):
        if re.fullmatch(r"\d{8}\.json", entry.key.rpartition("/")[2]):
            data = objects.read(entry.key)
            if data is not None:
                found.append(_read(data, f"{objects.uri}/{entry.key}"))
    return sorted((one for one in found if alias in (None, one.alias)), key=lambda one: one.number)


def _read(data: bytes, where: str) -> Promotion:
    try:
        return Promotion.model_validate_json(data)
    except ValueError as error:
        raise StageError(
            f"an entry of the promotion journal cannot be read: {where}",
            measured=f"{len(data)} bytes",
            limit="an entry as it was written, whole",
            remedy="Restore it from a backup, or remove it: the alias then stands where the entry before it says, and "
            "the recipe run again promotes anew.",
        ) from error


def head(objects: Objects, model: str, alias: str) -> Promotion | None:
    """The entry that an alias stands on, None when it was never promoted."""
    return standing_entry(history(objects, model, alias))


def standing_entry(entries: Sequence[Promotion]) -> Promotion | None:
    """The one of an alias's entries that it stands on, None for none."""
    return entries[-1] if entries and entries[-1].action != "withdraw" else None


def last(entries: Sequence[Promotion]) -> int:
    """The number of the newest of an alias's entries, 0 for none."""
    return entries[-1].number if entries else 0


def refuse_overtaken(entries: Sequence[Promotion], against: int) -> None:
    """Raise Overtaken where an alias has other entries than those up to the one that a verdict holds against."""
    if last(entries) == against:
        return
    measured = "the journal has lost its entries"
    if entries:
        measured = f"{entries[-1].action} to version {entries[-1].version.number} by {entries[-1].who}"
    raise Overtaken(
        "the alias has moved since it was judged against",
        measured=measured,
        remedy="Run again: it is judged against what stands there now.",
    )


def models(objects: Objects) -> list[str]:
    """The models that have a journal."""
    return sorted({entry.key.split("/")[1] for entry in objects.list(JOURNAL)})


def serving(objects: Objects, engine: str) -> list[Promotion]:
    """The entries that aliases of all models stand on and that serve an engine, given by its fingerprint."""
    found: list[Promotion] = []
    for model in models(objects):
        entries = history(objects, model)
        heads = [standing_entry([one for one in entries if one.alias == alias]) for alias in {e.alias for e in entries}]
        found += [one for one in heads if one and one.candidate.served == engine]
    return sorted(found, key=lambda one: (one.candidate.model, one.alias))


def append(
    objects: Objects,
    model: str,
    alias: str,
    action: Action,
    choose: Callable[[list[Promotion]], Version | None],
    why: str,
    against: int | None = None,
) -> Promotion | None:
    """Append an entry; of several at once exactly one gets each number, the others choose again.

    Args:
        objects: the store's.
        model: registered name.
        alias: it moves.
        action: what is done.
        choose: from the alias's entries so far, the version to stand on, or None to append nothing.
        why: the reason.
        against: number of the alias's entry that a verdict holds against, 0 for none; None where a person decides.

    Raises:
        Overtaken: the alias has another entry by now than the verdict holds against.
        StageError: MLflow takes no such alias, so that its projection could never follow.
    """
    checked_alias(alias)
    while True:
        everything = history(objects, model)
        entries = [one for one in everything if one.alias == alias]
        stood = standing_entry(entries)
        version = choose(entries)
        if version is None:
            return None
        if against is not None:
            refuse_overtaken(entries, against)
        entry = Promotion(
            number=everything[-1].number + 1 if everything else 1,
            action=action,
            alias=alias,
            version=version,
            previous=stood.version.number if stood else None,
            who=_who(),
            why=why,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            against=against,
        )
        if objects.put(f"{JOURNAL}{model}/{entry.number:08d}.json", entry.model_dump_json(indent=1).encode()):
            return entry


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
