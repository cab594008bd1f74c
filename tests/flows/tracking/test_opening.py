"""A run begins while MLflow is opened beside it."""

import threading
import time

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import pytest

from flows.prefect_api.retry import patiently
from flows.tracking import runs as module
from flows.tracking.runs import Close, Start, recipe_run
from stages.runtime.contract import Interrupted, StageError, Unavailable
from tests.flows.tracking.broken import children, states

RUN = Start(recipe="r", run="1")


def gated(tracking):
    """What opens MLflow once it may, and the gate."""
    gate = threading.Event()

    def opening():
        assert gate.wait(20)
        return tracking

    return opening, gate


def test_block_begins_before_mlflow_is_open_and_nothing_that_it_said_is_lost(tracking):
    opening, gate = gated(tracking)
    with recipe_run(opening, RUN) as run:
        step = run.child("healed", {"a": 1})
        step.metric("kl", 0.5, 7)
        step.note("a word")
        assert not run.opened.done()
        gate.set()
    assert states(tracking) == {"r": "FINISHED", "healed": "KILLED"}
    (child,) = children(tracking, run.id)
    assert child.data.params == {"a": "1"} and child.data.metrics == {"kl": 0.5}


@pytest.mark.parametrize("kind", [StageError, Unavailable])
@pytest.mark.parametrize("working", [True, False])
def test_mlflow_that_cannot_be_opened_stops_the_work_and_its_error_is_the_runs(tracking, kind, working):
    broken = kind("the experiment was deleted")
    opening, gate = gated(tracking)
    stopped = threading.Event()

    def breaking():
        opening()
        raise broken

    told = []
    close = Close(unopened=stopped.set, told=lambda *what: told.append(what))
    with pytest.raises(kind) as raised, recipe_run(breaking, RUN, close):
        gate.set()
        if working:
            assert stopped.wait(20)
            raise Interrupted("step healed was stopped")
    assert raised.value is broken and stopped.wait(20)
    assert isinstance(broken.__cause__, Interrupted) == working
    assert not told and states(tracking) == {}


def test_person_who_interrupts_is_heard_before_mlflow_is_open_and_the_run_is_killed_there(tracking):
    opening, gate = gated(tracking)
    threading.Timer(0.3, gate.set).start()
    with pytest.raises(KeyboardInterrupt), recipe_run(opening, RUN) as run:
        run.child("healed", {})
        raise KeyboardInterrupt
    assert states(tracking) == {"r": "KILLED", "healed": "KILLED"}
    for one in tracking.client.search_runs([tracking.experiment_id]):
        assert 0 <= one.info.end_time - one.info.start_time < 10_000, "it began before it ended"


def test_person_who_interrupts_does_not_wait_for_mlflow_that_stays_away_and_nothing_is_begun_there_later(
    tracking, monkeypatch
):
    monkeypatch.setattr(module, "HURRY_S", 0.2)
    asked, told, ended = [], [], threading.Event()

    def away():
        asked.append(time.monotonic())
        raise Unavailable("no MLflow answers")

    def again(ask, /, stopped=None):
        try:
            return patiently(ask, away_s=60, stopped=stopped)
        finally:
            ended.set()

    close = Close(again=again, told=lambda *what: told.append(what))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), recipe_run(away, RUN, close):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 2 and not told
    assert ended.wait(10), "it goes on asking"
    assert states(tracking) == {}
