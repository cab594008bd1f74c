"""A sweep of all that is old and of no use: of the store, of what lies beside it, of the records of runs.

A run's record goes later than the rest, and never while the run goes on, as one of the newest, or while the promotion
journal names a version that it registered.
"""

from __future__ import annotations

import time

from flows.registry.journal import history, models
from flows.reporting.format import size
from flows.running.run_records import Record, records
from stages.runtime.artifacts import Store
from stages.runtime.sweep import KEPT_SECONDS, Swept, newest, sweep, taken

RUNS_KEPT_SECONDS = 90 * 86400
RUNS_KEPT = 50
"""Records of so many runs stay, however old they are."""


def tidy(
    store: Store, *, older_than_s: float = KEPT_SECONDS, runs_older_than_s: float = RUNS_KEPT_SECONDS, dry: bool = False
) -> Swept:
    """Remove what is of no use and old enough, and count it.

    Args:
        store: it, and its scratch.
        older_than_s: longer than any publication lasts.
        runs_older_than_s: since a run's record last changed.
        dry: remove nothing, and count what would go.
    """
    swept = sweep(store, older_than_s=older_than_s, dry=dry)
    before = time.time() - runs_older_than_s
    found = records(store.scratch)
    found = found[: max(0, len(found) - RUNS_KEPT)]
    old = [one for one in found if newest(one.folder) < before and one.pid is None]
    named = _named(store) if old else set()
    for record in old:
        if _registered(record) not in named:
            swept.add("runs", taken(record.folder, dry=dry))
    return swept


def said(swept: Swept) -> list[str]:
    """One line a kind of what went."""
    kinds = [kind for kind, count in swept.counts.items() if count]
    return [f"{kind}: {swept.counts[kind]}, {size(swept.sizes[kind])}" for kind in sorted(kinds)]


def _named(store: Store) -> set[tuple[str, str] | None]:
    return {(model, entry.version.number) for model in models(store.objects) for entry in history(store.objects, model)}


def _registered(record: Record) -> tuple[str, str] | None:
    result = record.result
    return (result.model.name, result.model.version) if result and result.model else None
