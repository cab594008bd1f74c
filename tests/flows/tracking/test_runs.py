"""Runs, curves and files as MLflow gives them back."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from flows.tracking import runs as module
from flows.tracking.batches import flattened, valid_key
from flows.tracking.connect import Tracking, answered, open_tracking
from flows.tracking.runs import recipe_run
from stages.runtime.contract import Interrupted, StageError, Unavailable
from tests.flows.recorded import sealed, tracking_in


@pytest.fixture
def tracking(tmp_path, monkeypatch) -> Tracking:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking_in(tmp_path / "mlflow")


def children(tracking, parent_id):
    query = f"tags.`mlflow.parentRunId` = '{parent_id}'"
    return tracking.client.search_runs([tracking.experiment_id], query)


def read(tracking, run_id, name):
    return Path(tracking.client.download_artifacts(run_id, name)).read_text()


def test_run_with_a_finished_step_has_params_metrics_tags_and_files(tracking, store):
    files = {"config.json": b'{"a": 1}', "model.safetensors": b"x" * 50, "big.json": b"1" * 1_000_001}
    name, manifest = sealed(store, files, metrics={"parameters": 7.0}, method="basis", keep=0.95)
    with recipe_run(tracking, "smollm2", "run-1", {"why": "test"}, "recipe: 1\n") as parent:
        step = parent.child("shared", {"method": "basis", "search": {"keep": 0.95, "ranks": [1, 2]}})
        step.finished(manifest, name, store.uri, cached=False, store=store)
        parent.summary({"passed": 1.0}, {"verdict": "passed"})
    run = tracking.client.get_run(parent.id)
    (child,) = children(tracking, parent.id)
    assert (run.info.status, run.data.tags["enginery.run"], run.data.tags["why"]) == ("FINISHED", "run-1", "test")
    assert run.data.tags["verdict"] == "passed" and run.data.metrics["passed"] == 1
    assert read(tracking, parent.id, "recipe.yaml") == "recipe: 1\n"
    assert (child.info.status, child.info.run_name) == ("FINISHED", "shared")
    assert child.data.params == {"method": "basis", "search.keep": "0.95", "search.ranks": "[1, 2]"}
    assert child.data.metrics["parameters"] == 7 and child.data.metrics["seconds"] == 1.5
    assert child.data.metrics["artifact_bytes"] == manifest.size_bytes
    tags = child.data.tags
    assert (tags["enginery.fingerprint"], tags["enginery.cached"]) == (name, "false")
    assert tags["enginery.uri"] == f"{store.uri}#{name}"
    listed = json.loads(read(tracking, child.info.run_id, "files.json"))
    assert {file: one["logged"] for file, one in listed.items()} == {
        "config.json": True,
        "model.safetensors": False,
        "big.json": False,
    }
    assert listed["model.safetensors"] == {**manifest.files["model.safetensors"].model_dump(), "logged": False}
    assert read(tracking, child.info.run_id, "config.json") == '{"a": 1}'
    assert {one.path for one in tracking.client.list_artifacts(child.info.run_id)} == {"config.json", "files.json"}


def test_curve_is_in_mlflow_while_the_step_runs(tracking, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_S", 0.05)
    with recipe_run(tracking, "r", "1") as parent:
        step = parent.child("healed", {"tokens": 5})
        for i in range(3):
            step.progress.metric("kl", 1 / (i + 1), i)
        step.progress.note("block 1 of 3")
        step.progress.advanced(1, 3)
        for _ in range(200):
            running = tracking.client.get_run(step.id)
            if len(tracking.client.get_metric_history(step.id, "kl")) == 3 and "enginery.note" in running.data.tags:
                break
            time.sleep(0.05)
        assert running.info.status == "RUNNING"
        assert running.data.tags["enginery.note"] == "block 1 of 3" and running.data.params == {"tokens": "5"}
        step.progress.metric("kl", 0.25, 3)
        step.failed(StageError("no"))
    points = tracking.client.get_metric_history(step.id, "kl")
    assert [(p.step, p.value) for p in points] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]
    assert step.curve == {"kl": [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]}
    assert read(tracking, step.id, "notes.txt") == "block 1 of 3\n"


def test_metric_of_a_dense_curve_neither_waits_nor_loses_its_ends(tracking):
    with recipe_run(tracking, "r", "1") as parent:
        step = parent.child("healed", {})
        started = time.monotonic()
        for i in range(5_000):
            step.metric("a", i, i)
            step.metric("b", -i, i)
        spent = time.monotonic() - started
        step.interrupted()
    assert spent < 2
    for name in "ab":
        steps = sorted(p.step for p in tracking.client.get_metric_history(step.id, name))
        assert steps[0] == 0 and steps[-1] == 4_999 and 300 < len(steps) < 1_100
        assert max(b - a for a, b in pairwise(steps)) < 40


def test_flush_when_mlflow_fails_keeps_the_points_for_later(tracking, monkeypatch):
    from mlflow.exceptions import MlflowException

    def refuse(*_, **__):
        raise MlflowException("down")

    with recipe_run(tracking, "r", "1") as parent:
        step = parent.child("healed", {"a": 1})
        step.metric("kl", 1.0, 0)
        with monkeypatch.context() as down:
            down.setattr(tracking.client, "log_batch", refuse)
            step.flush()
        step.metric("kl", 0.5, 1)
        step.flush()
        assert len(tracking.client.get_metric_history(step.id, "kl")) == 2
        assert tracking.client.get_run(step.id).data.params == {"a": "1"}
        step.metric("kl", 0.5, 2)
        with monkeypatch.context() as down:
            down.setattr(tracking.client, "log_batch", refuse)
            with pytest.raises(Unavailable, match="down"):
                step.failed(ValueError("x"))


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (Interrupted("stop"), "KILLED"), (StageError("bad"), "FAILED")],
)
def test_run_that_raises_ends_with_its_steps(tracking, error, status):
    with pytest.raises(type(error)), recipe_run(tracking, "r", "1") as parent:
        step = parent.child("healed", {})
        failed = parent.child("pruned", {})
        failed.failed(StageError("what", measured=3, limit=2))
        failed.failed(StageError("twice"))
        raise error
    assert tracking.client.get_run(parent.id).info.status == status
    assert tracking.client.get_run(step.id).info.status == "KILLED"
    ended = tracking.client.get_run(failed.id)
    assert (ended.info.status, ended.data.tags["enginery.error"]) == ("FAILED", "what; measured 3; limit 2")


def test_steps_of_many_threads_keep_their_own_figures(tracking, store):
    made = [sealed(store, {"a.json": str(i).encode()}, metrics={"size_bytes": float(i)}, i=i) for i in range(8)]

    def work(i):
        step = parent.child(f"step-{i}", {"i": i})
        for n in range(50):
            step.metric("loss", i + n / 100, n)
            if n % 10 == 0:
                step.flush()
        step.finished(made[i][1], made[i][0], store.uri, cached=False, store=store)

    with recipe_run(tracking, "r", "1") as parent:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = children(tracking, parent.id)
    assert len(found) == 8
    for run in found:
        i = int(run.data.params["i"])
        assert run.info.run_name == f"step-{i}" and run.data.metrics["size_bytes"] == i
        assert run.info.status == "FINISHED" and run.data.metrics["loss"] == pytest.approx(i + 0.49)
        assert read(tracking, run.info.run_id, "a.json") == str(i)
        assert len(tracking.client.get_metric_history(run.info.run_id, "loss")) == 50


def test_cached_run_of_25_steps_stays_cheap(tracking, store):
    name, manifest = sealed(store, {"a.json": b"1"}, metrics={f"m{i}": 1.0 for i in range(8)})
    started = time.process_time()
    with recipe_run(tracking, "r", "1", recipe_text="recipe: 1") as parent:
        for i in range(25):
            parent.child(f"s{i}", {f"p{j}": j for j in range(10)}).finished(manifest, name, store.uri, True, store)
    assert time.process_time() - started < 2  # processor time, since others may use the machine
    found = children(tracking, parent.id)
    assert {run.data.tags["enginery.cached"] for run in found} == {"true"} and len(found) == 25
    assert "seconds" not in found[0].data.metrics and not tracking.client.list_artifacts(found[0].info.run_id)


def test_killed_run_is_ended_by_the_next_one(tracking):
    script = (
        "import os, signal, sys; from pathlib import Path; from flows.tracking.connect import open_tracking\n"
        "from flows.tracking.runs import recipe_run\n"
        "with recipe_run(open_tracking(Path(sys.argv[1])), 'r', 'first') as parent:\n"
        "    parent.child('healed', {}); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = Path(tracking.uri.removeprefix("sqlite:///")).parent
    done = subprocess.run([sys.executable, "-c", script, str(folder)], check=False, env={**os.environ})
    assert done.returncode == -9
    with recipe_run(tracking, "r", "second") as parent:
        states = {
            run.info.run_name: run.info.status for run in children_of_all(tracking) if run.info.run_id != parent.id
        }
    assert states == {"r": "KILLED", "healed": "KILLED"}


def children_of_all(tracking):
    return tracking.client.search_runs([tracking.experiment_id])


def test_open_by_several_processes_at_first_use_migrates_once(tmp_path):
    script = "import sys; from pathlib import Path; from flows.tracking.connect import open_tracking\n"
    script += "print(open_tracking(Path(sys.argv[1])).experiment_id)"
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    ran = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(tmp_path / "new")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in ran]
    assert [process.returncode for process in ran] == [0, 0], said
    assert said[0] == said[1] and said[0][1] == ""


def test_open_prefers_the_environments_uri_and_keeps_artifacts_beside_scratch(tmp_path, monkeypatch):
    tracking_in(tmp_path / "a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/a/mlflow.db")
    tracking = open_tracking(tmp_path / "b", experiment="of the environment")
    assert tracking.uri.endswith("/a/mlflow.db") and not (tmp_path / "b" / "mlflow.db").exists()
    location = tracking.client.get_experiment(tracking.experiment_id).artifact_location
    assert location == (tmp_path / "b" / "mlartifacts").as_uri()
    assert tracking.link("1") == f"mlflow ui --backend-store-uri {tracking.uri}"
    assert Tracking(tracking.client, "http://h:5/", "7").link("1") == "http://h:5/#/experiments/7/runs/1"


def test_open_a_deleted_experiment_names_the_remedy(tracking):
    tracking.client.delete_experiment(tracking.experiment_id)
    with pytest.raises(StageError, match="mlflow experiments restore"):
        tracking_in(Path(tracking.uri.removeprefix("sqlite:///")).parent)


def test_open_a_file_store_is_refused_with_mlflows_text(tmp_path):
    with pytest.raises(StageError, match="MLflow at file:"):
        open_tracking(tmp_path, uri=(tmp_path / "runs").as_uri())


def test_answered_tells_a_refusal_from_an_outage():
    from mlflow.exceptions import MlflowException

    with pytest.raises(Unavailable), answered("u"):
        raise MlflowException("connection lost")
    with pytest.raises(StageError, match="refused: no such") as caught, answered("u"):
        raise MlflowException("no such", error_code=1000)
    assert not isinstance(caught.value, Unavailable)


def test_flattened_long_values_and_odd_keys_are_taken_by_mlflow(tracking):
    params = {"a": {"x*y": None, "empty": {}}, "text": "z" * 7000, **{f"p{i}": i for i in range(150)}}
    with recipe_run(tracking, "r", "1") as parent:
        parent.child("s", params).interrupted()
        parent.child("t", {}).interrupted()
    by_name = {run.info.run_name: run.data.params for run in children(tracking, parent.id)}
    assert by_name["s"] == flattened(params) and len(by_name["s"]) == 153 and by_name["t"] == {}
    assert by_name["s"]["a.x_y"] == "null" and by_name["s"]["a.empty"] == "{}"
    assert len(by_name["s"]["text"]) < 6000 and flattened({"text": "z" * 7001})["text"] != by_name["s"]["text"]
    assert valid_key("a" * 300) == "a" * 250
