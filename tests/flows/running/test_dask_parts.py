"""A divided step on Dask: parts of a cluster's processes or of threads here come to the bytes of the undivided run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pytest
from distributed import Client
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.running import dask_parts
from flows.running.child_process import Launcher
from flows.running.dask_parts import LEAST_UNITS, MOST_UNITS, divided, scatter
from flows.running.order import Order
from flows.settings import settle
from stages import stage
from stages.adapters.connect import connect
from stages.runtime import parts
from stages.runtime.artifacts import Store
from stages.runtime.contract import Interrupted, StageError, Unavailable
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import ROOT, fingerprint
from stages.runtime.progress import Silent

PLAIN = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
KEPT = {k: v for k, v in os.environ.items() if k.startswith(("COVERAGE_", "COV_"))}
SPANS = [range(0, 16), range(16, 32), range(32, 40)]


class Heard(Silent):
    def __init__(self):
        self.notes, self.done, self.moving = [], [], threading.Event()

    def note(self, text):
        self.notes.append(text)

    def advanced(self, done, total):
        self.done.append((done, total))


@pytest.fixture(scope="module")
def prefect():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def launcher(shared_store, tmp_path):
    """A launcher on the shared objects with a scratch folder of its own."""
    return Launcher(Store(shared_store.objects, tmp_path / "scratch"), "process", 2, tmp_path / "logs")


def ordered(model, text, windows=40):
    definition = stage("validate")
    params = definition.params(window_tokens=64, windows=windows)
    return Order(step="judged", stage="validate", params=params,
                 work=work_of(definition, params, {"model": model, "text": text}))  # fmt: skip


def undivided(params, model, text, output):
    """The report of a run that finds no part."""
    output.mkdir()
    stage("validate").run(params, {"model": model, "text": text}, output, Silent())
    return (output / "report.json").read_bytes()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Dask scheduler and the function that gives it a worker: real processes on the loopback."""
    folder, started = tmp_path_factory.mktemp("dask"), []

    def start(*command):
        with (folder / f"log-{len(started)}").open("wb") as log:
            started.append(
                subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]], cwd=folder,
                                 env={**PLAIN, **KEPT, "HOME": str(folder)}, stdout=log, stderr=log)
            )  # fmt: skip

    file = folder / "scheduler.json"
    loopback = ("--host", "127.0.0.1")
    start("scheduler", *loopback, "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))
    with Client(scheduler_file=str(file), timeout=60, set_as_default=False) as client:
        address = client.scheduler.address
        worker = ("worker", address, *loopback, "--nthreads", "1", "--no-dashboard", "--no-nanny")
        yield address, lambda: (start(*worker), start(*worker), client.wait_for_workers(2, timeout=60))
    for process in reversed(started):
        process.terminate()
        process.wait(20)


def test_parts_are_several_a_worker_and_neither_small_nor_huge():
    assert divided(40, 2, []) == SPANS
    assert [len(span) for span in divided(1000, 2, [])] == [125] * 8
    assert max(len(span) for span in divided(10_000, 2, [])) == MOST_UNITS
    assert divided(LEAST_UNITS, 8, []) == [range(LEAST_UNITS)]
    assert divided(64, 1, [range(16, 32)]) == [range(16), range(32, 48), range(48, 64)]


@pytest.mark.fault
def test_cluster_without_worker_or_scheduler_is_said_to_be_unavailable(cluster, launcher, dense, topics, monkeypatch):
    monkeypatch.setattr(dask_parts, "WORKERS_WITHIN_S", 1)
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        for address in (cluster[0], "tcp://127.0.0.1:1"):
            with pytest.raises(Unavailable, match="no scheduler that answers, or no worker") as told:
                scatter(ordered(dense, topics), launcher, address, Heard())
            assert "ENGINERY_SHARDS" in told.value.remedy


@pytest.mark.fault
def test_cluster_computes_the_missing_parts_and_the_step_gathers_the_undivided_bytes(
    prefect, cluster, launcher, shared_store, dense, topics, tmp_path
):
    cluster[1]()
    one, heard, objects = ordered(dense, topics), Heard(), launcher.store.objects
    identity = fingerprint(one.work)
    objects.put(f"parts/{identity}/0-4.json", b'{"work": "another"}')
    scatter(one, launcher, cluster[0], heard)
    assert heard.notes == ["3 parts of 36 units on 2 workers"]
    assert [done for done in heard.done if done[0] == done[1]] == [(36, 36)]
    assert sorted(map(repr, parts.standing(objects, identity))) == [
        "range(0, 4)", "range(20, 36)", "range(36, 40)", "range(4, 20)"
    ]  # fmt: skip
    gathered = Heard()
    made = launcher.run(one, gathered)
    report = (launcher.store.checkout(made.identity) / "report.json").read_bytes()
    model, text = (shared_store.checkout(made.manifest.work.inputs[role]) for role in ("model", "text"))
    assert report == undivided(one.params, model, text, tmp_path / "alone")
    assert gathered.done[-1] == (40, 40) and min(gathered.done) >= (36, 40), "the poisoned part alone was scored again"
    assert parts.standing(objects, identity) == []


@pytest.mark.fault
def test_part_that_fails_says_so_with_its_own_error(prefect, launcher, topics):
    one = ordered("0" * 64, topics)
    with pytest.raises(StageError, match="input 'model' of validate is not sealed"):
        scatter(one, launcher, "threads:2", Heard())


@pytest.mark.fault
def test_scatter_that_is_stopped_ends_its_children_and_raises(prefect, launcher, dense, topics):
    class Stopping(Heard):
        def note(self, text):
            threading.Timer(1.5, launcher.stop).start()

    one = ordered(dense, topics, windows=200)
    with pytest.raises(Interrupted):
        scatter(one, launcher, "threads:2", Stopping())
    deadline = time.monotonic() + 60
    while launcher._running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not launcher._running
    assert parts.standing(launcher.store.objects, fingerprint(one.work)) == []


RECIPE = """
recipe: 1
name: sharded
steps:
  - {name: dense, stage: fetch, params: {source: SOURCE}}
  - {name: text, stage: corpus, params: {source: "pydoc://topics", splits: {train: 0.9, test: 0.1}}}
  - {name: judged, stage: validate, inputs: {model: dense, text: text}, params: {window_tokens: 64, windows: 40}}
"""


@pytest.mark.service
@pytest.mark.timeout(600)
def test_run_with_shards_on_threads_seals_what_a_run_without_seals(prefect, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SOURCE", tiny.as_uri()))
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", str(recipe), "--store", str(tmp_path / "store"), "--json"],
        env={**PLAIN, **KEPT, "HOME": str(tmp_path), "ENGINERY_SHARDS": "threads:2",
             "PREFECT_API_URL": PREFECT_API_URL.value()},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.find("{") :])
    dense, text, judged = (step["fingerprint"] for step in result["steps"])
    store = connect(str(tmp_path / "store"))
    assert "3 parts of 40 units on 2 workers" in "".join(
        path.read_text() for path in Path(result["report"]).parent.glob("*.jsonl")
    )
    params = stage("validate").params(window_tokens=64, windows=40)
    alone = undivided(params, store.checkout(dense), store.checkout(text), tmp_path / "alone")
    assert (store.checkout(judged) / "report.json").read_bytes() == alone
    assert list(store.objects.list(parts.PARTS)) == []


@pytest.mark.parametrize("where", ["", "threads:3", "tcp://dask:8786", "tls://10.0.0.7:8786"])
def test_settings_take_a_place_for_shards_from_the_environment(monkeypatch, where):
    monkeypatch.setenv("ENGINERY_SHARDS", where)
    assert settle().shards == where
    assert settle(shards="threads:1").shards == "threads:1"


@pytest.mark.parametrize("where", ["threads:0", "threads:", "dask:8786", "threads:2x", "tcp://"])
def test_settings_refuse_a_place_for_shards_that_is_none(where):
    with pytest.raises(StageError, match="cannot be computed there"):
        settle(shards=where)
