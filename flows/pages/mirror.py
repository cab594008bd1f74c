"""Run records as flow runs in Prefect's database, written by the models of Prefect's own server, in its process.

Prefect's API gives every state the time at which it hears of it (`StateCreate` of 3.8 has no time, and forbids fields
that it does not know), so that history would look as if it had happened today. Every row has an id that follows from
the run's name: to mirror a record twice writes nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import sqlalchemy as sa
from prefect.server import models
from prefect.server.database import PrefectDBInterface, provide_database_interface
from prefect.server.schemas import actions, core, states
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from flows.pages.record_states import FlowRun, State, StepRun, flow_run, read
from flows.running.run_records import Record, records
from stages.runtime.contract import StageError

_MODELS: Any = models
"""Its injector of the database hides from mypy that these are coroutines."""
FLOW = "optimize"
TAG = "enginery"
LOOK_S = 1.0
_LOG = logging.getLogger("enginery.mirror")
_STOPPED = frozenset({states.StateType.CANCELLING, states.StateType.CANCELLED})


class Mirror:
    """Keeps Prefect's pages at what the records below `scratch` say, as long as `follow` runs."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._db: PrefectDBInterface = provide_database_interface()
        self._seen: dict[str, object] = {}
        self._told_to_end: set[str] = set()

    async def follow(self) -> None:
        """Mirror every record, oldest first, then what changes, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Mirror the records that have changed since the last look. One that cannot be read hides no other."""
        for record in await asyncio.to_thread(records, self._scratch):
            changed = await asyncio.to_thread(_signature, record)
            if self._seen.get(record.name) == changed:
                continue
            try:
                goes_on = await self._mirrored(record)
            except SQLAlchemyError as error:  # such as a database that is locked: at the next look
                _LOG.warning("run %s is not mirrored: %s", record.name, error)
                continue
            except (OSError, ValueError, KeyError) as error:
                _LOG.warning("run %s cannot be read: %s", record.name, error)
                goes_on = False
            # A run that goes on is looked at each time: someone may press Cancel on its page.
            self._seen[record.name] = None if goes_on else changed

    async def _mirrored(self, record: Record) -> bool:
        run = flow_run(await asyncio.to_thread(read, record))
        async with self._db.session_context(begin_transaction=True) as session:
            stopped = await self._written(session, run)
        if stopped and run.goes_on and record.name not in self._told_to_end:
            self._told_to_end.add(record.name)
            with suppress(StageError):  # it has ended by itself
                record.cancel()
        return run.goes_on

    async def _written(self, session: AsyncSession, run: FlowRun) -> bool:
        """Write what is missing of a run; returns whether it was cancelled on its page."""
        flow_run_id = _id(run.key)
        found = await _MODELS.flow_runs.read_flow_run(session, flow_run_id)
        stopped = found is not None and found.state is not None and found.state.type in _STOPPED
        if found is None:
            flow = await _MODELS.flows.create_flow(session, core.Flow(name=FLOW))
            made = core.FlowRun(
                id=flow_run_id,
                flow_id=flow.id,
                name=run.name,
                parameters=dict(run.parameters),
                tags=[run.key, TAG],
                idempotency_key=run.key,
            )
            await _MODELS.flow_runs.create_flow_run(session, made)
            await self._dated(session, self._db.FlowRun, flow_run_id, run.states[0].at)
        held = await self._ids(session, self._db.FlowRunState, self._db.FlowRunState.flow_run_id == flow_run_id)
        for id_, state in _states(run.key, "", run.states):
            if id_ not in held:
                await _MODELS.flow_runs.set_flow_run_state(session, flow_run_id, state, force=True)
        await self._steps(session, run, flow_run_id)
        await self._lines(session, run, flow_run_id)
        await self._artifacts(session, run, flow_run_id)
        return stopped

    async def _steps(self, session: AsyncSession, run: FlowRun, flow_run_id: UUID) -> None:
        table, state = self._db.TaskRun, self._db.TaskRunState
        known = await self._ids(session, table, table.flow_run_id == flow_run_id)
        held = await self._ids(session, state, state.task_run_id.in_(known)) if known else set()
        for step in run.steps:
            task_run_id = _id(run.key, step.name)
            if task_run_id not in known:
                await _MODELS.task_runs.create_task_run(session, _task_run(run.key, step, flow_run_id))
                await self._dated(session, table, task_run_id, run.states[0].at)
            for id_, one in _states(run.key, step.name, step.states):
                if id_ not in held:
                    await _MODELS.task_runs.set_task_run_state(session, task_run_id, one, force=True)

    async def _lines(self, session: AsyncSession, run: FlowRun, flow_run_id: UUID) -> None:
        """A log only grows: what is beyond the lines that are there is new."""
        table = self._db.Log
        counted = sa.select(sa.func.count()).select_from(table).where(table.flow_run_id == flow_run_id)
        new = run.lines[int((await session.execute(counted)).scalar_one()) :]
        lines = [
            actions.LogCreate(
                name="enginery",
                level=line.level,
                message=line.text,
                timestamp=line.at,
                flow_run_id=flow_run_id,
                task_run_id=_id(run.key, line.step) if line.step else None,
            )
            for line in new
        ]
        for batch in models.logs.split_logs_into_batches(lines):
            await _MODELS.logs.create_logs(session, batch)

    async def _artifacts(self, session: AsyncSession, run: FlowRun, flow_run_id: UUID) -> None:
        table = self._db.Artifact
        held = await self._ids(session, table, table.flow_run_id == flow_run_id)
        # One key a recipe: Prefect keeps the versions of an artifact under its key, the last one first.
        key = "".join(c if c.isascii() and c.isalnum() else "-" for c in run.name.lower()).strip("-")
        for one in run.artifacts:
            id_ = _id(run.key, "", one.what)
            if id_ in held:
                continue
            await _MODELS.artifacts.create_artifact(
                session,
                core.Artifact(
                    id=id_,
                    key=f"{one.what}-{key}",
                    type=one.type,
                    description=one.description,
                    data=one.data,
                    flow_run_id=flow_run_id,
                ),
            )
            await self._dated(session, table, id_, run.states[-1].at)

    async def _dated(self, session: AsyncSession, table: Any, id_: UUID, at: datetime) -> None:
        """Have a row begin when what it tells of did: Prefect's timeline reaches to what was made last."""
        await session.execute(sa.update(table).where(table.id == id_).values(created=at, updated=at))

    async def _ids(self, session: AsyncSession, table: Any, where: Any) -> set[UUID]:
        return set((await session.execute(sa.select(table.id).where(where))).scalars())


def _task_run(key: str, step: StepRun, flow_run_id: UUID) -> core.TaskRun:
    return core.TaskRun(
        id=_id(key, step.name),
        flow_run_id=flow_run_id,
        name=step.name,
        task_key=step.name,
        dynamic_key="0",
        tags=[step.stage] if step.stage else [],
        task_inputs={"reads": [core.TaskRunResult(id=_id(key, one)) for one in step.after]},
    )


def _states(key: str, step: str, told: Sequence[State]) -> list[tuple[UUID, states.State]]:
    """Prefect's states with ids of ours; one that is told again has the same."""
    made = []
    for one in told:
        id_ = _id(key, step, f"state {one.name}")
        state = states.State(
            id=id_, type=states.StateType(one.type), name=one.name, timestamp=one.at, message=one.message or None
        )
        made.append((id_, state))
    return made


def _id(*words: str) -> UUID:
    return uuid5(NAMESPACE_URL, "\n".join(("enginery", *words)))


def _signature(record: Record) -> tuple[object, ...]:
    """What is other where a record has changed."""
    log = record.folder / "log.jsonl"
    ends = tuple((record.folder / name).exists() for name in ("result.json", "failure.json"))
    return (log.stat().st_size if log.exists() else 0, ends, record.pid)
