"""How runs end while MLflow is away, slow or refuses."""

import threading
import time

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import pytest
from mlflow.exceptions import MlflowException

from flows.tracking import runs as module
from flows.tracking.datasets import Dataset
from flows.tracking.runs import Close
from stages.runtime.contract import Interrupted, StageError
from tests.flows.recorded import sealed
from tests.flows.tracking.broken import asked_again, begun, broken, read_all, states


def test_flush_when_mlflow_fails_keeps_the_points_for_later(tracking):
    with begun(tracking) as parent:
        step = parent.child("healed", {"a": 1})
        step.metric("kl", 1.0, 0)
        with broken("log_batch"):
            step.flush()
        step.metric("kl", 0.5, 1)
        step.flush()
        assert len(tracking.client.get_metric_history(step.id, "kl")) == 2
        assert tracking.client.get_run(step.id).data.params == {"a": "1"}


@pytest.mark.parametrize(
    "call", ["create_run", "log_batch", "set_terminated", "log_text", "log_artifacts", "log_inputs"]
)
def test_run_whose_last_calls_fail_for_a_while_leaves_nothing_running(tracking, store, call):
    name, manifest = sealed(store, {"a.json": b"1"}, metrics={"loss": 1.0})
    told = []
    close = Close(again=asked_again, told=lambda what, error: told.append((what, error)))
    read = {"healed": (Dataset("text", "f" * 64, "pydoc://topics", ("train",)),)}
    with begun(tracking, close=close, read=read) as parent:
        healed, pruned = parent.child("healed", {"a": 1}), parent.child("pruned", {})
        healed.note("a word")
        failing = broken(call, times=3)
        with failing as made:
            healed.finished(manifest, name, store.uri, cached=False, store=store)
            pruned.failed(StageError("no"))
            for _ in range(2):
                healed.flush()
                pruned.flush()
        assert len(made) > 1
    assert states(tracking) == {"r": "FINISHED", "healed": "FINISHED", "pruned": "FAILED"} and told == []
    assert tracking.client.get_run(healed.id).data.metrics["loss"] == 1
    assert read_all(tracking, healed.id) == {"a.json", "files.json", "notes.txt"}


def test_error_of_a_run_is_not_hidden_by_mlflow_that_fails_to_end_it(tracking):
    told = []
    close = Close(told=lambda what, error: told.append(what))
    with broken("set_terminated"), pytest.raises(ValueError, match="the stage"), begun(tracking, close=close):
        raise ValueError("the stage's own")
    assert told == ["the end of MLflow's run"]


def test_interrupt_does_not_wait_for_an_mlflow_that_hangs(tracking, monkeypatch):
    from mlflow import MlflowClient

    told, whole = [], MlflowClient.set_terminated
    hang = threading.Event()
    monkeypatch.setattr(module, "HURRY_S", 0.2)
    monkeypatch.setattr(MlflowClient, "set_terminated", lambda *_, **__: hang.wait(30))
    close = Close(told=lambda what, error: told.append(str(error)))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), begun(tracking, close=close):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5 and "in time; limit 0.2 s" in told[0]
    hang.set()
    monkeypatch.setattr(MlflowClient, "set_terminated", whole)


def test_figures_that_mlflow_refuses_fail_no_step_and_are_told(tracking):

    told = []
    close = Close(told=lambda what, error: told.append((what, str(error))))
    with begun(tracking, close=close) as parent:
        step = parent.child("healed", {})
        step.settle()
        step.metric("kl", 1.0, 0)
        with broken("log_batch", MlflowException("not like this", error_code=1000), times=1):
            step.failed(StageError("no"))
            step.flush()
    assert len(told) == 1 and told[0][0] == "the figures of healed in MLflow" and "not like this" in told[0][1]
    ended = tracking.client.get_run(step.id)
    assert (ended.info.status, ended.data.tags["enginery.error"]) == ("FAILED", "no")


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (Interrupted("stop"), "KILLED"), (StageError("bad"), "FAILED")],
)
def test_run_that_raises_ends_with_its_steps(tracking, error, status):
    with pytest.raises(type(error)), begun(tracking) as parent:
        step = parent.child("healed", {})
        failed = parent.child("pruned", {})
        failed.failed(StageError("what", measured=3, limit=2))
        failed.failed(StageError("twice"))
        raise error
    assert tracking.client.get_run(parent.id).info.status == status
    assert tracking.client.get_run(step.id).info.status == "KILLED"
    ended = tracking.client.get_run(failed.id)
    assert (ended.info.status, ended.data.tags["enginery.error"]) == ("FAILED", "what; measured 3; limit 2")
