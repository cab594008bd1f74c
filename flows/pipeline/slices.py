"""Whether a corpus has what gates ask of it, asked as soon as it is there: long before anything is judged by it."""

from __future__ import annotations

import json
from difflib import get_close_matches

from flows.recipe.model import Gate
from flows.running.session import Session
from stages.measures.items import HARNESS, ITEMS, SOURCES_OF_SLICES
from stages.measures.table import BROUGHT, MEASURED_BY, MEASURES
from stages.runtime.contract import Kind, StageError


def check_slices(session: Session, name: str) -> None:
    """Refuse gates on a slice that a corpus, now sealed, has not, and on what its items are not measured by.

    Args:
        session: of the run.
        name: of the step that was done.

    Raises:
        StageError: it names the slice, and those that there are, or the measure, and those that fit.
    """
    done, recipe = session.done[name], session.recipe
    if done.kind is not Kind.CORPUS or recipe.judge is None or name not in recipe.judge.corpora:
        return
    # A gate that names no corpus speaks of each on which its measure is: the judge looks there.
    gates = [gate for gate in recipe.gates if gate.corpus == name]
    if not gates:
        return
    record = json.loads((session.store.checkout(done.fingerprint) / "corpus.json").read_text(encoding="utf-8"))
    if HARNESS in record:
        return
    for gate in gates if ITEMS in record else ():
        check_measured(gate, name, frozenset(record[ITEMS]))
    split = recipe.judge.split
    have = sorted(
        own
        for key in SOURCES_OF_SLICES
        for own, about in record.get(key, {}).items()
        if about.get("characters", about).get(split)
    )
    for asked in [gate.slice for gate in gates if gate.slice]:
        if asked not in have:
            near = get_close_matches(asked, have, 1)
            raise StageError(
                f"a gate asks for the slice {asked!r} of {name}, which has none of that name in its split {split}",
                limit=", ".join(have) or "no slice",
                remedy=f"Did you mean {near[0]!r}?" if near else "Name one of these in the gate, or leave `slice` out.",
            )


def check_measured(gate: Gate, name: str, tasks: frozenset[str]) -> None:
    """Raise StageError where not all items are measured as a gate asks, or none of those that it may look at."""
    known = MEASURES.get(gate.measure)
    if gate.measure.startswith(BROUGHT) or known is None or not known.of_items:
        return
    some = gate.slice or gate.worst
    fits = {measure: _fits(one.score, tasks, some=bool(some)) for measure, one in MEASURES.items() if one.of_items}
    if not fits[gate.measure]:
        raise StageError(
            f"a gate asks for {gate.measure} of {name}, whose items are not measured by it",
            measured=f"they are of {', '.join(sorted(tasks))}",
            limit=", ".join(measure for measure, fit in fits.items() if fit),
            remedy="Gate on one of these, or name a slice of items that have it.",
        )


def _fits(score: str, tasks: frozenset[str], *, some: bool) -> bool:
    having = MEASURED_BY.get(score)
    return having is None or (bool(tasks & {*having}) if some else tasks <= {*having})
