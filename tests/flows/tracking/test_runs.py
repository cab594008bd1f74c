"""Runs, curves and files as MLflow gives them back."""

import json
import threading
import time
from itertools import pairwise

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import pytest

from flows.tracking import runs as module
from flows.tracking.batches import flattened, valid_key
from flows.tracking.datasets import Dataset
from flows.tracking.ends import End
from flows.tracking.runs import Close
from stages.runtime.contract import StageError
from tests.flows.recorded import sealed
from tests.flows.tracking.broken import (
    begun,
    children,
    note,
    read,
)


def test_run_with_a_finished_step_has_params_metrics_tags_and_files(tracking, store):
    files = {"config.json": b'{"a": 1}', "model.safetensors": b"x" * 50, "big.json": b"1" * 1_000_001}
    name, manifest = sealed(store, files, metrics={"parameters": 7.0}, method="basis", keep=0.95)
    with begun(tracking, "smollm2", "run-1", tags={"why": "test"}, text="recipe: 1\n") as parent:
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
    assert child.data.metrics["parameters"] == 7 and "seconds" not in child.data.metrics
    assert child.data.metrics["artifact_bytes"] == manifest.size_bytes
    tags = child.data.tags
    assert (tags["enginery.fingerprint"], tags["enginery.cached"]) == (name, "false")
    assert (tags["enginery.seconds"], tags["enginery.peak_rss_bytes"]) == ("1.50", "1000000000")
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
    with begun(tracking) as parent:
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
    with begun(tracking) as parent:
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


def test_metric_that_is_no_finite_number_is_named_and_not_drawn(tracking):
    with begun(tracking) as parent:
        step = parent.child("healed", {})
        step.metric("kl", 1.0, 0)
        step.metric("kl", float("nan"), 1)
        step.metric("loss", float("inf"), 1)
        parent.summary({"perplexity.text": float("nan"), "size_bytes": 7.0})
    run, child = tracking.client.get_run(parent.id), tracking.client.get_run(step.id)
    assert run.data.metrics == {"size_bytes": 7.0} and run.data.tags["enginery.not_finite"] == "perplexity.text"
    assert child.data.metrics == {"kl": 1.0} and child.data.tags["enginery.not_finite"] == "kl, loss"


def test_run_has_params_datasets_and_a_description_on_its_page_and_the_step_its_error(tracking):
    text = Dataset("text", "a" * 64, "pydoc://topics", ("calibrate", "test"))
    dense = Dataset("dense", "b" * 64, "/models/dense", ("checkpoint",))
    read = {"": (dense, text), "healed": (text,)}
    close = Close(end=lambda _, run_id, error: End("FAILED", f"**gate failed** of {run_id}"))
    params = {"int8": {"scheme": "int8_w8a8", "search": {"ranks": [1]}}}
    with begun(tracking, close=close, params=params, read=read) as parent:
        parent.child("healed", {}).failed(StageError("what", measured=3, limit=2))
    run, (child,) = tracking.client.get_run(parent.id), children(tracking, parent.id)
    assert run.data.params == {"int8.scheme": "int8_w8a8", "int8.search.ranks": "[1]"}
    assert (run.info.status, note(tracking, parent.id)) == ("FAILED", f"**gate failed** of {parent.id}")
    assert "what; measured 3; limit 2" in note(tracking, child.info.run_id)
    seen = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert {name: one.tags[0].value for name, one in seen.items()} == {"dense": "checkpoint", "text": "calibrate, test"}
    assert seen["text"].dataset.digest == "a" * 36 and seen["text"].dataset.source_type == "pydoc"
    assert json.loads(seen["dense"].dataset.source) == {"uri": "/models/dense"}
    assert [one.dataset.name for one in child.inputs.dataset_inputs] == ["text"]


def test_steps_of_many_threads_keep_their_own_figures(tracking, store):
    made = [sealed(store, {"a.json": str(i).encode()}, metrics={"size_bytes": float(i)}, i=i) for i in range(8)]

    def work(i):
        step = parent.child(f"step-{i}", {"i": i})
        for n in range(50):
            step.metric("loss", i + n / 100, n)
            if n % 10 == 0:
                step.flush()
        step.finished(made[i][1], made[i][0], store.uri, cached=False, store=store)

    with begun(tracking) as parent:
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
    with begun(tracking, text="recipe: 1") as parent:
        for i in range(25):
            parent.child(f"s{i}", {f"p{j}": j for j in range(10)}).finished(manifest, name, store.uri, True, store)
    assert time.process_time() - started < 2  # processor time, since others may use the machine
    found = children(tracking, parent.id)
    assert {run.data.tags["enginery.cached"] for run in found} == {"true"} and len(found) == 25
    assert "enginery.seconds" not in found[0].data.tags and not tracking.client.list_artifacts(found[0].info.run_id)


def test_flattened_long_values_and_odd_keys_are_taken_by_mlflow(tracking):
    params = {"a": {"x*y": None, "empty": {}}, "text": "z" * 7000, **{f"p{i}": i for i in range(150)}}
    with begun(tracking) as parent:
        parent.child("s", params).interrupted()
        parent.child("t", {}).interrupted()
    by_name = {run.info.run_name: run.data.params for run in children(tracking, parent.id)}
    assert by_name["s"] == flattened(params) and len(by_name["s"]) == 153 and by_name["t"] == {}
    assert by_name["s"]["a.x_y"] == "null" and by_name["s"]["a.empty"] == "{}"
    assert len(by_name["s"]["text"]) < 6000 and flattened({"text": "z" * 7001})["text"] != by_name["s"]["text"]
    assert valid_key("a" * 300) == "a" * 250
