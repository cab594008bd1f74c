"""The parts of a divided stage's work, each computed by any process that reaches the store."""

from __future__ import annotations

from typing import Any

from stages.runtime import parts
from stages.runtime.artifacts import Store
from stages.runtime.contract import Divided, Params, Progress, Stage, StageError, Work
from stages.runtime.execute import check, check_executor, checked_out, room
from stages.runtime.fingerprint import fingerprint


def count_units(stage: Stage[Any], params: Params, work: Work, store: Store) -> int:
    """How many independent units a work has.

    Raises:
        StageError: as of `execute_part`.
    """
    divided = _divided(stage, params, work, store)
    with room(store):
        return divided.count(params, checked_out(work, store))


def execute_part(stage: Stage[Any], params: Params, work: Work, store: Store, span: range, progress: Progress) -> None:
    """Compute the units `span` of a work and add them to the store, where `execute` gathers them.

    Raises:
        StageError: the stage is not divided, or this is not the machine that the work names; nothing was added.
        DoesNotFit: memory or disk ran out; nothing was added.
    """
    divided = _divided(stage, params, work, store)
    identity = fingerprint(work)
    if parts.read(store.objects, identity, span) is None:
        with room(store):
            data = divided.part(params, checked_out(work, store), span, progress)
            parts.put(store.objects, identity, span, data)


def _divided(stage: Stage[Any], params: Params, work: Work, store: Store) -> Divided[Any]:
    if stage.divided is None:
        raise StageError(f"the work of {stage.name} is not divided into parts", remedy="Run the step as a whole.")
    check(stage, params, work, store)
    check_executor(stage, params, work)
    return stage.divided
