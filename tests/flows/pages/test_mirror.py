"""The mirror on a database of Prefect's own: every run once, with its own times, and a Cancel that reaches the run."""

import asyncio
import json
import signal
import socket
import subprocess
from contextlib import contextmanager
from datetime import datetime, timedelta

import psutil
import pytest

from flows.recipe.model import Recipe
from flows.running.run_records import open_run
from stages.runtime.contract import StageError
from tests.flows.test_cli import result

pytestmark = pytest.mark.fault  # Prefect's migrations take ten seconds

RECIPE = {
    "recipe": 1,
    "name": "tiny",
    "steps": [
        {"name": "dense", "stage": "fetch", "params": {"source": "x://y"}},
        {"name": "graph", "stage": "export", "inputs": {"model": "dense"}},
    ],
}
BEGAN = datetime.fromisoformat("2026-01-02T03:04:05+00:00")


def begun(scratch, day=0):
    """A record that began on a day of January 2026, with one step sealed and one running."""
    record = open_run(scratch, Recipe.model_validate(RECIPE), ["enginery", "run"])
    began = BEGAN + timedelta(days=day)
    facts = record.facts | {"started": began.isoformat()}
    (record.folder / "run.json").write_text(json.dumps(facts))
    for seconds, event in (
        (1, {"event": "started", "step": "dense", "why": "new"}),
        (3, {"event": "sealed", "step": "dense", "fingerprint": "ab" * 32, "cached": False}),
        (4, {"event": "started", "step": "graph", "why": "new"}),
    ):
        with (record.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"at": (began + timedelta(seconds=seconds)).isoformat(), **event}) + "\n")
    return record


@contextmanager
def database(folder):
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings

    url = f"sqlite+aiosqlite:///{folder}/prefect.db"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url, PREFECT_API_URL: ""}):
        yield


async def held(db):
    """Every run with its states, its tasks with theirs, its lines and artifacts, as the database has them."""
    import sqlalchemy as sa

    async with db.session_context() as session:

        async def rows(table, *order):
            return (await session.execute(sa.select(table).order_by(*order))).scalars().unique().all()

        states = {one.id: one for one in await rows(db.FlowRunState, db.FlowRunState.timestamp)}
        return {
            "runs": {one.tags[0]: one for one in await rows(db.FlowRun, db.FlowRun.start_time)},
            "states": [(one.flow_run_id, one.name, one.message) for one in states.values()],
            "steps": {(one.flow_run_id, one.name): one for one in await rows(db.TaskRun, db.TaskRun.name)},
            "step states": [one.name for one in await rows(db.TaskRunState, db.TaskRunState.timestamp)],
            "lines": [one.message for one in await rows(db.Log, db.Log.timestamp)],
            "artifacts": [(one.key, one.flow_run_id) for one in await rows(db.Artifact, db.Artifact.key)],
        }


def counts(found):
    return {what: len(rows) for what, rows in found.items()}


@pytest.fixture
def sleeper():
    """A process that does nothing, in place of one that runs a recipe."""
    made = subprocess.Popen(["sleep", "120"])
    yield made
    made.kill()
    made.wait()


def test_mirror_writes_every_run_once_with_its_own_times_and_cancel_reaches_it(tmp_path, sleeper):
    async def story():
        from prefect.server import models
        from prefect.server.database import provide_database_interface
        from prefect.server.schemas import states

        from flows.pages.mirror import Mirror

        db = provide_database_interface()
        await db.create_db()
        passed, broken, going = (begun(tmp_path, day) for day in range(3))
        own = {"pid": sleeper.pid, "started": psutil.Process(sleeper.pid).create_time(), "host": socket.gethostname()}
        (going.folder / "pid").write_text(json.dumps(own))
        passed.finish(result(run=passed.name))
        broken.failed(StageError("no room"))
        torn = tmp_path / "runs" / "20260101-000000-torn"
        torn.mkdir()
        (torn / "run.json").write_text("{")
        await Mirror(tmp_path).look()
        first = await held(db)
        # Another server on the same store, as by a second `enginery ui`, and a second look of the same one.
        again = Mirror(tmp_path)
        await again.look()
        await again.look()
        assert counts(await held(db)) == counts(first)

        runs = first["runs"]
        assert {name: run.state_name for name, run in runs.items()} == {
            passed.name: "Completed",
            broken.name: "Failed",
            going.name: "Running",
        }
        assert runs[broken.name].state.message == "no room"
        assert runs[going.name].start_time == BEGAN + timedelta(days=2)
        assert runs[going.name].parameters["recipe"]["name"] == "tiny"
        dense, graph = (first["steps"][runs[going.name].id, name] for name in ("dense", "graph"))
        assert dense.total_run_time == timedelta(seconds=2) and dense.end_time - dense.start_time == timedelta(
            seconds=2
        )
        assert graph.state_name == "Running" and graph.task_inputs["reads"][0].id == dense.id

        async with db.session_context(begin_transaction=True) as session:
            asked = states.State(type=states.StateType.CANCELLING)
            await models.flow_runs.set_flow_run_state(session, runs[going.name].id, asked, force=True)
        await again.look()
        assert await asyncio.to_thread(sleeper.wait, 5) == -signal.SIGTERM
        going.failed(KeyboardInterrupt())
        await again.look()
        last = await held(db)
        assert last["runs"][going.name].state_name == "Cancelled"
        assert last["steps"][runs[going.name].id, "graph"].state_name == "Cancelled"
        assert "interrupted" in last["lines"]

    with database(tmp_path):
        asyncio.run(story())
