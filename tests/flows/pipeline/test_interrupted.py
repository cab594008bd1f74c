"""Every way of ending a run, at moments that nobody chose: in a step, between two, while it is planned, at its end.

$ENGINERY_TEST_MOMENTS says how many moments (five by default), $ENGINERY_TEST_SEED from which seed they are drawn (the
day's date by default).
"""

import datetime
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.runtime.fingerprint import ROOT
from tests.flows.in_terminal import WAYS, Command

CUT = Path(__file__).with_name("cut.yaml")
SEED = os.environ.get("ENGINERY_TEST_SEED") or datetime.datetime.now(datetime.UTC).date().isoformat()
MOMENTS = int(os.environ.get("ENGINERY_TEST_MOMENTS", "5"))
WITHIN_S = 5.0

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]


def enginery(*arguments, home, env=None):
    plain = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(home), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "flows", *map(str, arguments), "--json"]
    done = subprocess.run(words, env={**plain, "OMP_NUM_THREADS": "1", **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digests(result):
    return {step["name"]: step["fingerprint"] for step in result["steps"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """The recipe run to its end without a break: its seconds, and what it made."""
    home = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    result = enginery("run", CUT, "--store", home / "store", "--set", f"steps.dense.params.source={tiny}", home=home)
    return time.monotonic() - began, result


def assert_interrupted(command, how, took, store):
    """One line, 130, the same state everywhere, nothing left."""
    told = f"{how} after {took:.1f} s\n{command.said[-2000:]}"
    assert command.code == 130, told
    assert took <= WITHIN_S, told
    assert command.left() == [], told
    if how != "closed terminal":
        assert command.said.count("interrupted: what is sealed stays") == 1, told
    for word in ("Traceback", "refused", "error:", "Exception ignored"):
        assert word not in command.said, told
    records = sorted((store / "state" / "runs").iterdir()) if (store / "state" / "runs").is_dir() else []
    if not records:
        return "before it had begun"
    failure = json.loads((records[-1] / "failure.json").read_text())
    assert failure["interrupted"] and not (records[-1] / "pid").exists(), told
    database = store / "state" / "mlflow.db"
    with sqlite3.connect(database) as connection:
        tables = {name for (name,) in connection.execute("select name from sqlite_master")}
        found = list(connection.execute("select status from runs")) if "runs" in tables else []
    assert all(status in ("KILLED", "FINISHED") for (status,) in found), f"{found}\n{told}"
    return "while it was planned" if not found else f"with {len(found)} runs in MLflow"


def ways(count):
    """(way, share of the whole run) of each moment."""
    drawn = random.Random(SEED)
    return [(how, drawn.random()) for _, how in zip(range(count), drawn.sample([*WAYS] * count, count), strict=False)]


@pytest.mark.parametrize(("how", "share"), ways(MOMENTS))
def test_run_ended_at_any_moment_ends_as_asked_and_goes_on_to_the_same_digests(tmp_path, tiny, whole, how, share):
    seconds, result = whole
    for attempt in range(4):
        store = tmp_path / f"store{attempt}"
        asked = ("run", CUT, "--store", store, "--set", f"steps.dense.params.source={tiny}")
        command = Command(*asked, home=tmp_path)
        # From the first tenth of a second on: before it Python itself is loaded, and not yet the command.
        if not command.read_until(command.began + 0.15 + share * (seconds - 1)):
            break
        command.close()
        share /= 2  # this run was quicker than the one that was timed
    else:
        pytest.fail(f"the run ended within {share:.0%} of {seconds:.0f} s, four times")
    took = command.end(how)
    where = assert_interrupted(command, how, took, store)
    sys.stdout.write(f"{how} at {share:.2f} of the run, {where}: {took:.2f} s\n")
    assert digests(enginery(*asked, home=tmp_path)) == digests(result)
