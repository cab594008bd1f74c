"""Whether the slices that gates name are there, asked as soon as a corpus is: long before anything is judged by it."""

from __future__ import annotations

import json
from difflib import get_close_matches

from flows.running.session import Session
from stages.measures.items import HARNESS, SOURCES_OF_SLICES
from stages.runtime.contract import Kind, StageError


def check_slices(session: Session, name: str) -> None:
    """Refuse gates on a slice that a corpus, now sealed, has not.

    Args:
        session: of the run.
        name: of the step that was done.

    Raises:
        StageError: it names the slice, and those that there are.
    """
    done, recipe = session.done[name], session.recipe
    if done.kind is not Kind.CORPUS or recipe.judge is None or name not in recipe.judge.corpora:
        return
    # A gate that names no corpus speaks of each on which its measure is: the judge looks there.
    wanted = [gate.slice for gate in recipe.gates if gate.slice and gate.corpus == name]
    if not wanted:
        return
    record = json.loads((session.store.checkout(done.fingerprint) / "corpus.json").read_text(encoding="utf-8"))
    if HARNESS in record:
        return
    split = recipe.judge.split
    have = sorted(
        own
        for key in SOURCES_OF_SLICES
        for own, about in record.get(key, {}).items()
        if about.get("characters", about).get(split)
    )
    for asked in wanted:
        if asked not in have:
            near = get_close_matches(asked, have, 1)
            raise StageError(
                f"a gate asks for the slice {asked!r} of {name}, which has none of that name in its split {split}",
                limit=", ".join(have) or "no slice",
                remedy=f"Did you mean {near[0]!r}?" if near else "Name one of these in the gate, or leave `slice` out.",
            )
