"""Prefect's API that goes away under a step, and machines that are gone without a word: real servers and workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.prefect_api.retry import api, patiently
from flows.running import attempts, following
from flows.running.placement import Place, Pools
from flows.running.work_pool import Dispatcher
from stages.runtime.contract import Interrupted, StageError
from stages.runtime.fingerprint import fingerprint
from tests.flows.prefect_server import Server, eventually, runs_of
from tests.flows.running.test_child_process import SPLITS, order, text
from tests.flows.running.test_work_pool import Heard, ours, thread

pytestmark = pytest.mark.fault  # a server of its own

ROOT = Path(__file__).parents[3]


def asked(ask):  # type: ignore[no-untyped-def]
    """The server's answer. One on SQLite answers 503 while its database is held; the product waits then, too."""
    return patiently(ask, away_s=60)


class Site:
    """A server, a work pool `slow`, and a worker of real processes, each of which can be killed."""

    def __init__(self, server: Server, mark: Path) -> None:
        self.server, self.mark = server, mark
        self._worker: subprocess.Popen[bytes] | None = None
        self.deployment: object = None

    def deploy(self) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate

        with api() as client:
            flow = asked(lambda: client.create_flow_from_name("run-stage"))
            asked(lambda: client.create_work_pool(WorkPoolCreate(name="slow", type="process")))
            self.deployment = asked(
                lambda: client.create_deployment(
                    flow,
                    "slow",
                    work_pool_name="slow",
                    entrypoint="tests.flows.slow.run_stage",
                    pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
                    enforce_parameter_schema=False,
                )
            )

    def start_worker(self) -> None:
        mine = {
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "5",
            "PREFECT_CLIENT_MAX_RETRIES": "3",
        }
        self._worker = subprocess.Popen(
            [Path(sys.executable).with_name("prefect"), "worker", "start", "--pool", "slow", "--type", "process"],
            env={**os.environ, **mine},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill_worker(self) -> None:
        """The worker, and what it started: a machine that lost its power."""
        if self._worker is not None:
            os.killpg(self._worker.pid, signal.SIGKILL)
            self._worker.wait()
            for pid in self.started():
                try:
                    os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._worker = None

    def started(self) -> list[int]:
        """The process groups of the runs that began."""
        path = self.mark.with_name(f"{self.mark.name}.pids")
        if not path.is_file():
            return []
        found = []
        for pid in path.read_text().split():
            try:
                found.append(os.getpgid(int(pid)))
            except ProcessLookupError:
                continue
        return [one for one in found if one != os.getpgid(0)]

    def dispatcher(self, store, **pools) -> Dispatcher:  # type: ignore[no-untyped-def]
        return Dispatcher(store, Pools(stages={"corpus": Place(pool="slow")}, **pools), 1, "a-run")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:  # type: ignore[no-untyped-def]
    from prefect.settings import PREFECT_API_URL, temporary_settings

    mark, server = tmp_path / "mark", Server()
    server.start()
    monkeypatch.setenv("ENGINERY_TEST_MARK", str(mark))
    monkeypatch.setenv("PREFECT_API_URL", server.api)
    with temporary_settings({PREFECT_API_URL: server.api}):
        made = Site(server, mark)
        made.deploy()
        made.start_worker()
        yield made
        made.kill_worker()
    server.close()


class Launched:
    """A step on its way, in a thread."""

    def __init__(self, running, one):  # type: ignore[no-untyped-def]
        self.outcome, self.error, self.heard = None, None, Heard()

        def launch():
            try:
                self.outcome = running.launch(one, self.heard)
            except StageError as error:
                self.error = error

        self.thread = thread(launch)
        self.thread.start()


def book(store, tmp_path):
    return order(store, "corpus", {"source": text(tmp_path), "splits": SPLITS})


def beating(store, one):
    """Whether the container of a step has said that it lives."""
    return any(found.key.endswith("pulse.json") for found in store.objects.list("relays/"))


def test_api_that_is_away_under_a_step_and_at_its_end_costs_no_second_attempt(site, store, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "SILENT_S", 40)
    one, running = book(store, tmp_path), site.dispatcher(store)
    step = Launched(running, one)
    assert eventually(lambda: beating(store, one), 90)
    site.server.stop()
    time.sleep(45)  # more than Prefect's own tries take, and more than the silence that would be a loss
    site.mark.touch()
    step.thread.join(60)  # the store tells that it is sealed, while the API is still away
    assert step.outcome is not None and step.outcome.identity == fingerprint(one.work), step.error
    time.sleep(20)  # Prefect's own tries at the flow's end would be used up
    site.server.start()

    def states():
        return [run["state"]["type"] for run in runs_of(site.server.api, site.deployment)]

    assert eventually(lambda: states() == ["COMPLETED"], 60), states()
    assert not [note for note in step.heard.notes if "started again" in note]


def test_machine_that_is_gone_without_a_word_is_noticed_by_its_silence_and_the_step_starts_again(
    site, store, tmp_path, monkeypatch
):
    monkeypatch.setattr(following, "SILENT_S", 25)
    one, running = book(store, tmp_path), site.dispatcher(store, no_worker_seconds=120)
    step = Launched(running, one)
    assert eventually(lambda: beating(store, one), 90)
    site.kill_worker()
    site.mark.touch()
    key = running.key(one)
    assert eventually(lambda: len(ours(site.deployment, f"work:{key}")) == 2, 60)
    assert any("heard nothing of it" in note for note in step.heard.notes)
    assert {run["state"]["type"] for run in ours(site.deployment, f"work:{key}").values()} == {"CRASHED", "SCHEDULED"}
    site.start_worker()
    step.thread.join(90)
    assert step.outcome is not None and step.outcome.identity == fingerprint(one.work), step.error


def test_run_that_is_stopped_while_the_api_is_away_ends_at_once(site, store, tmp_path):
    one, running = book(store, tmp_path), site.dispatcher(store)
    step = Launched(running, one)
    assert eventually(lambda: beating(store, one), 90)
    site.server.stop()
    time.sleep(3)
    began = time.monotonic()
    running.stop()
    step.thread.join(10)
    assert time.monotonic() - began < 5
    assert isinstance(step.error, Interrupted)


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_attempts_after_an_operator_removed_one_are_new_runs(site, removed):
    site.kill_worker()  # nobody runs them

    def begun():
        known = attempts.attempts(client, "a-work")
        return attempts.begin(known, "a-work", pool="slow", name="x", tags=[], parameters={}, job_variables={})

    with api() as client:
        made = []
        for _ in range(3):
            made.append(asked(begun))
            attempts.cancel(client, made[-1], "for the test")
        assert [one.idempotency_key for one in made] == [f"work:a-work:{number}" for number in (1, 2, 3)]
        gone = made.pop(removed).id
        asked(lambda: client.delete_flow_run(gone))
        new = asked(begun)
        assert new.id not in {one.id for one in made}
        assert not attempts.is_final(asked(lambda: client.read_flow_run(new.id)))
        found = asked(lambda: attempts.attempts(client, "a-work"))
        assert [one.id for one in found] == [*(one.id for one in made), new.id]
        assert asked(lambda: begun_again(client, new)) == new.id


def begun_again(client, new):
    """Another run that has not seen the newest attempt gets the same one."""
    known = [one for one in attempts.attempts(client, "a-work") if one.id != new.id]
    return attempts.begin(known, "a-work", pool="slow", name="x", tags=[], parameters={}, job_variables={}).id


def test_step_whose_flow_run_was_removed_says_so(site, store, tmp_path):
    one, running = book(store, tmp_path), site.dispatcher(store)
    step = Launched(running, one)
    assert eventually(lambda: beating(store, one), 90)
    with api() as client:
        flow_run = next(iter(ours(site.deployment, "work:").values()))["id"]
        asked(lambda: client.delete_flow_run(flow_run))
    step.thread.join(20)
    assert step.error is not None and "removed from Prefect" in str(step.error)
