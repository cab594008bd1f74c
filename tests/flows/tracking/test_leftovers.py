"""Runs that nobody ended are ended by a later one, and no others."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from flows.tracking.ends import End
from flows.tracking.leftovers import alive
from flows.tracking.runs import Close
from stages.runtime.contract import Unavailable
from tests.flows.tracking.broken import (
    begun,
    broken,
    children_of_all,
    note,
    states,
)

LEFT = {
    "reused number": ({"enginery.process_started": "12.00"}, "KILLED"),
    "no process of this number": ({"enginery.process": f"{socket.gethostname()}:99999999"}, "KILLED"),
    "without a time, as older versions wrote it": ({}, "RUNNING"),
    "another user's": ({"enginery.process": f"{socket.gethostname()}:1"}, "RUNNING"),
    "another host's": ({"enginery.process": "elsewhere:99999999"}, "RUNNING"),
    "somebody else's run": ({"enginery.process": ""}, "RUNNING"),
}


@pytest.mark.parametrize("case", LEFT)
def test_leftover_is_told_from_what_runs_without_proc(tracking, monkeypatch, case):
    tags, status = LEFT[case]
    ours = {"enginery.process": f"{socket.gethostname()}:{os.getppid()}", **tags}
    made = tracking.client.create_run(tracking.experiment_id, tags=ours).info.run_id
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path, **how: path.parts[:2] != ("/", "proc") and exists(path, **how))
    with begun(tracking):
        assert tracking.client.get_run(made).info.status == status


def test_process_that_may_not_be_looked_at_counts_as_alive(monkeypatch):
    import psutil

    def hidden(pid):
        raise psutil.NoSuchProcess(pid)

    def denied(pid):
        raise psutil.AccessDenied(pid)

    for refusal in (hidden, denied):
        monkeypatch.setattr(psutil, "Process", refusal)
        monkeypatch.setattr(os, "kill", lambda pid, signal: (_ for _ in ()).throw(PermissionError()))
        assert alive(1, None)
    monkeypatch.setattr(psutil, "Process", hidden)
    monkeypatch.setattr(os, "kill", lambda pid, signal: (_ for _ in ()).throw(ProcessLookupError()))
    assert not alive(1, None)


def test_killed_run_is_ended_by_the_next_one(tracking):
    script = (
        "import os, signal, sys; from pathlib import Path; from flows.tracking.connect import open_tracking\n"
        "from flows.tracking.runs import Start, recipe_run\n"
        "with recipe_run(lambda: open_tracking(Path(sys.argv[1])), Start(recipe='r', run='first')) as parent:\n"
        "    parent.child('healed', {}).settle(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = Path(tracking.uri.removeprefix("sqlite:///")).parent
    done = subprocess.run([sys.executable, "-c", script, str(folder)], check=False, env={**os.environ})
    assert done.returncode == -9
    with begun(tracking, run="second") as parent:
        states = {
            run.info.run_name: run.info.status for run in children_of_all(tracking) if run.info.run_id != parent.id
        }
    assert states == {"r": "KILLED", "healed": "KILLED"}


def test_run_whose_end_never_comes_through_is_told_and_ended_by_the_next_one(tracking):
    told = []
    close = Close(told=lambda what, error: told.append((what, type(error), str(error))))
    with broken("set_terminated") as made, begun(tracking, run="first", close=close) as parent:
        parent.child("healed", {})
    assert [(what, kind) for what, kind, _ in told] == [("the end of MLflow's run", Unavailable)] and "down" in told[0][
        2
    ]
    assert made and set(states(tracking).values()) == {"RUNNING"}
    known = End("FINISHED", "**passed**")
    other = Close(known=lambda _tracking, _id, run: known if run == "first" else None)
    with begun(tracking, recipe="other", run="second", close=other):
        assert tracking.client.get_run(parent.id).info.status == "FINISHED"
    assert note(tracking, parent.id) == "**passed**"
    assert set(states(tracking).values()) == {"FINISHED"}


def test_run_beside_one_of_the_same_process_ends_it_not(tracking):
    with begun(tracking, recipe="one", run="first"):
        with begun(tracking, recipe="other", run="second"):
            assert states(tracking) == {"one": "RUNNING", "other": "RUNNING"}
        assert states(tracking) == {"one": "RUNNING", "other": "FINISHED"}


def test_leftover_that_mlflow_refuses_to_end_is_told_and_hides_no_other(tracking):
    gone = {"enginery.process": f"{socket.gethostname()}:99999999"}
    made = [tracking.client.create_run(tracking.experiment_id, tags=gone).info.run_id for _ in range(2)]
    told = []
    close = Close(told=lambda what, error: told.append((what, str(error))))
    refusal = MlflowException("not yours", error_code=PERMISSION_DENIED)
    with broken("set_terminated", refusal, times=1), begun(tracking, close=close):
        ended = sorted(tracking.client.get_run(one).info.status for one in made)
    assert ended == ["KILLED", "RUNNING"]
    assert [what for what, _ in told] == ["the end of an earlier run in MLflow"] and "not yours" in told[0][1]
