"""Records of runs go when nobody needs them, and never one that goes on or that registered what is promoted."""

import json
import os
import time

import psutil
import pytest

from flows.pipeline import tidying
from flows.pipeline.tidying import said, tidy
from flows.registry import journal
from flows.registry.journal import Candidate, Executable, Version
from flows.running.run_records import open_run, records
from tests.flows.test_cli import result
from tests.flows.triggers.test_watch import recipe

DAY = 86400


@pytest.fixture
def run(store):
    def one(*, days, model="", running=False):
        record = open_run(store.scratch, recipe(), ["x"])
        if not running:
            made = result(passed=bool(model), run=record.name)
            record.finish(
                made.model_copy(update={"model": made.model and made.model.model_copy(update={"name": model})})
            )
        then = time.time() - days * DAY
        for path in (*record.folder.rglob("*"), record.folder):
            os.utime(path, (then, then))
        return record.name

    return one


def names(store):
    return {record.name for record in records(store.scratch)}


def test_old_records_go_and_those_that_anybody_needs_stay(store, run, monkeypatch):
    monkeypatch.setattr(tidying, "RUNS_KEPT", 0)
    engine = Executable(fingerprint="a" * 64, target="onnxruntime:cpu", judged=True)
    candidate = Candidate(model="m", serves="cpu", executables={"cpu": engine}, verdict={"passed": True}, run="r")
    version = Version(number="3", logged_model="", candidate=candidate)
    journal.append(store.objects, "m", "champion", "promote", lambda _: version, "")
    kept = {run(days=89), run(days=400, model="m"), run(days=400, running=True)}
    gone = {run(days=91), run(days=400, model="never-promoted")}
    dry = tidy(store, dry=True)
    assert dry.counts["runs"] == 2 and dry.sizes["runs"] > 500 and names(store) == kept | gone
    assert tidy(store) == dry and names(store) == kept
    assert said(dry)[0].startswith("runs: 2, ")
    assert tidy(store, runs_older_than_s=88 * DAY).counts["runs"] == 1


def test_the_newest_records_stay_however_old_they_are(store, run):
    for number in range(3):
        run(days=1000 - number)
    assert tidy(store).counts["runs"] == 0
    for _ in range(tidying.RUNS_KEPT - 1):
        run(days=500)
    assert tidy(store).counts["runs"] == 2
    assert len(names(store)) == tidying.RUNS_KEPT


def test_record_of_a_process_that_ended_is_no_running_run(store, run, monkeypatch):
    monkeypatch.setattr(tidying, "RUNS_KEPT", 0)
    name = run(days=100, running=True)
    pid = store.scratch / "runs" / name / "pid"
    facts = json.loads(pid.read_text())
    assert tidy(store).counts["runs"] == 0 and facts["started"] == psutil.Process().create_time()
    pid.write_text(json.dumps(facts | {"started": 1.0}))
    os.utime(pid, (1, 1))
    os.utime(pid.parent, (1, 1))
    assert tidy(store).counts["runs"] == 1
