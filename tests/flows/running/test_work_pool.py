"""Steps in work pools, on a real Prefect server with real workers: processes here, containers in tests/production."""

from __future__ import annotations

import atexit
import contextvars
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.running.child_process import Launcher
from flows.running.placement import Place, Pools
from flows.running.work_pool import Dispatcher
from stages.runtime.artifacts import RELAYS
from stages.runtime.contract import Interrupted, StageError
from stages.runtime.fingerprint import fingerprint
from stages.runtime.progress import Silent
from tests.flows.prefect_server import eventually, prefect_api, runs_of  # noqa: F401
from tests.flows.running.test_child_process import SPLITS, order, text

pytestmark = pytest.mark.fault  # real processes, each of which takes seconds to begin

ROOT = Path(__file__).parents[3]


class Heard:
    def __init__(self):
        self.shares, self.notes = [], []

    def advanced(self, done, total):
        self.shares.append(done / total)

    def metric(self, name, value, step):
        pass

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def pool(prefect_api):  # noqa: F811
    """Makes a work pool with a runner deployment and, unless told otherwise, a worker of real processes."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    def make(name, entrypoint="flows.running.container.run_stage", *, worker=True):
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"), overwrite=True)
            flow = client.create_flow_from_name("run-stage")
            made = client.create_deployment(
                flow,
                name,
                work_pool_name=name,
                entrypoint=entrypoint,
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
                enforce_parameter_schema=False,
            )
        if worker:
            _start_worker(name)
        return made

    return make


def _start_worker(name):
    if name in _WORKERS:
        return
    ours = {"PYTHONPATH": str(ROOT), "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_WORKER_HEARTBEAT_SECONDS": "5"}
    worker = _WORKERS[name] = subprocess.Popen(
        [Path(sys.executable).with_name("prefect"), "worker", "start", "--pool", name, "--type", "process"],
        env={**os.environ, **ours},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(lambda: (os.killpg(worker.pid, signal.SIGKILL), worker.wait()))


_WORKERS: dict[str, subprocess.Popen[bytes]] = {}


def dispatcher(store, pool, **pools):
    return Dispatcher(store, Pools(stages={"corpus": Place(pool=pool)}, **pools), 1, "a-run")


def ours(deployment, key):
    """Idempotency key -> flow run, of one work."""
    found = runs_of(os.environ["PREFECT_API_URL"], deployment)
    return {run["idempotency_key"]: run for run in found if run["idempotency_key"].startswith(key)}


def thread(target):
    """A thread with this test's settings of Prefect."""
    return threading.Thread(target=contextvars.copy_context().run, args=(target,))


def book(store, tmp_path):
    return order(store, "corpus", {"source": text(tmp_path), "splits": SPLITS})


def test_dispatch_step_in_a_pool_seals_it_and_tells_what_it_said(pool, store, tmp_path):
    pool("plain")
    one, heard = book(store, tmp_path), Heard()
    made = Launcher(store, "pool", 1, tmp_path, dispatcher=dispatcher(store, "plain")).run(one, heard)
    assert not made.cached
    assert made.identity == fingerprint(one.work)
    assert store.manifest(made.identity) == made.manifest
    assert heard.shares[-1] == 1
    assert not list(store.objects.list(RELAYS))


def test_dispatch_stage_error_comes_back_whole_and_the_next_attempt_is_a_new_run(pool, store, tmp_path):
    deployment = pool("plain")
    path = tmp_path / "short.txt"
    path.write_text("Too short for four splits.")
    one = order(store, "corpus", {"source": path.as_uri(), "splits": SPLITS})
    said = []
    for _ in range(2):
        with pytest.raises(StageError) as told:
            dispatcher(store, "plain").launch(one, Silent())
        said.append(told.value)
    assert said[0].remedy and said[0].limit
    with pytest.raises(StageError) as inline:
        Launcher(store, "inline", 1, tmp_path).run(one, Silent())
    assert str(said[0]) == str(said[1]) == str(inline.value)
    key = f"work:{dispatcher(store, 'plain').key(one)}"
    assert sorted(ours(deployment, key)) == [f"{key}:1", f"{key}:2"]


def test_dispatch_two_runs_of_one_work_follow_one_container(pool, store, tmp_path):
    deployment = pool("plain")
    one, outcomes, heard = book(store, tmp_path), [], [Heard(), Heard()]
    runs = [thread(lambda h=h: outcomes.append(dispatcher(store, "plain").launch(one, h))) for h in heard]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [made.identity for made in outcomes] == 2 * [fingerprint(one.work)]
    key = f"work:{dispatcher(store, 'plain').key(one)}"
    assert len(ours(deployment, key)) == 1


def test_dispatch_work_that_another_run_has_just_sealed_starts_no_container(pool, store, tmp_path):
    deployment = pool("plain")
    one = book(store, tmp_path)
    made = [dispatcher(store, "plain").launch(one, Heard()) for _ in range(2)]
    assert [outcome.identity for outcome in made] == 2 * [fingerprint(one.work)]
    assert [outcome.cached for outcome in made] == [False, True]
    assert len(ours(deployment, f"work:{dispatcher(store, 'plain').key(one)}")) == 1


def test_dispatch_pool_without_a_live_worker_says_so_in_time(pool, store, tmp_path):
    pool("idle", worker=False)
    began, heard = time.monotonic(), Heard()
    with pytest.raises(
        StageError, match=r"work pool idle has no live worker.*none was ever seen.*worker start --pool idle"
    ):
        dispatcher(store, "idle", no_worker_seconds=3).launch(book(store, tmp_path), heard)
    assert time.monotonic() - began < 30
    assert "no live worker" in heard.notes[0]


def test_dispatch_pool_that_is_not_there_is_refused(pool, store, tmp_path):
    pool("plain")
    with pytest.raises(StageError, match=r"nowhere.*enginery deploy"):
        dispatcher(store, "nowhere").launch(book(store, tmp_path), Silent())


def test_dispatch_lost_container_is_started_again(pool, store, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("ENGINERY_TEST_MARK", str(mark))
    pool("lossy", "tests.flows.lossy.run_stage")
    heard = Heard()
    made = dispatcher(store, "lossy").launch(book(store, tmp_path), heard)
    assert mark.exists()
    assert store.manifest(made.identity)
    assert any("was lost" in note for note in heard.notes)


def test_dispatch_stopped_run_cancels_what_it_started(pool, store, tmp_path):
    deployment = pool("idle", worker=False)
    one, told = book(store, tmp_path), []
    running = dispatcher(store, "idle", no_worker_seconds=60)

    def launch():
        try:
            running.launch(one, Silent())
        except Interrupted as error:
            told.append(error)

    waiting = thread(launch)
    waiting.start()
    key = f"work:{running.key(one)}"
    assert eventually(lambda: ours(deployment, key))
    running.stop()
    waiting.join(30)
    assert told
    (run,) = ours(deployment, key).values()
    assert run["state"]["type"] in ("CANCELLED", "CANCELLING")
