"""A record in Prefect's words: how each end of a run reads, when it was, and what became of its steps."""

import json
from datetime import datetime, timedelta

import pytest

from flows.pages.record_states import Told, flow_run
from flows.results import RunLine
from tests.flows.test_cli import result

BEGAN = datetime.fromisoformat("2026-01-02T03:04:05+00:00")
STEPS = {
    "dense": ("fetch", ()),
    "cpu": ("compile", ("dense",)),
    "validate-cpu-text": ("validate", ("cpu",)),
}


def at(seconds):
    return (BEGAN + timedelta(seconds=seconds)).isoformat()


def event(seconds, name, step="", **more):
    return {"at": at(seconds), "event": name, **({"step": step} if step else {}), **more}


SEALED = event(2, "sealed", "dense", fingerprint="ab" * 32, cached=True)
BEGUN = (SEALED, event(3, "started", "cpu", why="params.x: 1 -> 2"), event(4, "note", "cpu", text="half done"))


def told(state, *events, came_to=None, error=""):
    line = RunLine(run="r1", recipe="tiny", state=state, started=at(0), seconds=None, model="", error=error)
    return flow_run(Told(line=line, result=came_to, events=events, command=["enginery", "run"], steps=STEPS))


def states(run):
    return {step.name: (step.states[-1].type, step.states[-1].name) for step in run.steps}


def failed_gate():
    return result(passed=False)


UNJUDGED = result().model_copy(update={"gates": [], "verdict": "not judged"})
ENDS = {
    "passed": (result(), (event(9, "finished"),), ("COMPLETED", "Completed"), "passed", 9),
    "not judged": (UNJUDGED, (event(9, "finished"),), ("COMPLETED", "Completed"), "not judged", 9),
    "gate failed": (failed_gate(), (event(9, "finished"),), ("FAILED", "Failed"), "measured 1.3, limit", 9),
    "interrupted": (None, (event(9, "error", what="KeyboardInterrupt"),), ("CANCELLED", "Cancelled"), "interrupted", 9),
    "error": (None, (event(9, "error", what="no room"),), ("FAILED", "Failed"), "no room", 9),
    "ended": (None, (), ("CRASHED", "Crashed"), "ended without a word", 4),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_end_of_a_run_has_its_state_its_words_and_its_own_time(case):
    came_to, events, state, words, seconds = ENDS[case]
    known = "passed" if case == "not judged" else case
    run = told(known, *BEGUN, *events, came_to=came_to, error="no room" if case == "error" else "")
    assert [(one.type, one.name) for one in run.states] == [("RUNNING", "Running"), state]
    assert words in run.states[-1].message and words in run.lines[-1].text
    assert [one.at.isoformat() for one in run.states] == [at(0), at(seconds)]
    verdict = next(one for one in run.artifacts if one.what == "verdict")
    assert words in verdict.data.replace("\\", "")
    assert ("/runs/r1/report.html" in verdict.data) == (came_to is not None)
    assert "/runs/r1/mlflow" in verdict.data
    assert not run.goes_on


def test_run_that_goes_on_has_no_end_and_no_artifact():
    run = told("running", *BEGUN)
    assert run.goes_on and not run.artifacts
    assert states(run) == {
        "dense": ("COMPLETED", "Cached"),
        "cpu": ("RUNNING", "Running"),
        "validate-cpu-text": ("PENDING", "Pending"),
    }
    assert [(line.step, line.text) for line in run.lines][2:] == [
        ("cpu", "cpu: started: params.x: 1 -> 2"),
        ("cpu", "cpu: half done"),
    ]


@pytest.mark.parametrize(
    ("state", "events", "cpu"),
    [
        ("interrupted", [event(9, "error", what="x")], ("CANCELLED", "Cancelled")),
        ("interrupted", [event(8, "interrupted", "cpu"), event(9, "error", what="x")], ("CANCELLED", "Cancelled")),
        ("error", [event(9, "error", what="x")], ("FAILED", "Failed")),
        ("error", [event(8, "failed", "cpu", what="x"), event(9, "error", what="x")], ("FAILED", "Failed")),
        # Another step broke, and this one was cut off by it.
        ("error", [event(8, "failed", "dense", what="x"), event(9, "error", what="x")], ("CANCELLED", "Cancelled")),
        ("ended", [], ("CRASHED", "Crashed")),
    ],
)
def test_step_that_was_running_ends_with_its_run_and_those_behind_it_never_started(state, events, cpu):
    run = told(state, *BEGUN, *events, error="x")
    assert states(run)["cpu"] == cpu
    last = run.steps[-1].states
    assert [one.name for one in last] == ["Pending", "Cancelled"] and last[-1].message == "never started"


def test_states_of_one_moment_follow_each_other_by_a_millisecond():
    dense = told("running", *BEGUN).steps[0]
    assert [one.name for one in dense.states] == ["Pending", "Running", "Cached"]
    assert dense.states[2].at - dense.states[1].at == timedelta(milliseconds=1)


def test_log_only_grows_also_by_what_is_told_after_the_end():
    loose = event(10, "loose end", what="MLflow's alias", error="E: x", remedy="Wait.")
    before = told("passed", *BEGUN, came_to=result()).lines
    at_the_end = told("passed", *BEGUN, event(9, "finished"), came_to=result()).lines
    after = told("passed", *BEGUN, event(9, "finished"), loose, came_to=result()).lines
    assert [line.text for line in before] == [line.text for line in at_the_end]
    assert after[:-1] == at_the_end and "MLflow's alias did not come about" in after[-1].text


def test_table_of_steps_says_how_long_each_ran_and_what_it_measured():
    sealed = [event(n, "sealed", name, fingerprint="ab" * 32, cached=False) for n, name in ((8, "cpu"),)]
    run = told("passed", *BEGUN, *sealed, event(9, "finished"), came_to=result())
    rows = {row["step"]: row for row in json.loads(next(one for one in run.artifacts if one.what == "steps").data)}
    assert rows["cpu"]["seconds"] == 5 and rows["cpu"]["size, MB"] == 90 and rows["cpu"]["state"] == "Completed"
    assert rows["validate-cpu-text"]["perplexity"] == 21.7


def test_record_whose_recipe_is_of_another_version_is_told_by_its_log():
    line = RunLine(run="r1", recipe="tiny", state="running", started=at(0), seconds=None, model="", error="")
    run = flow_run(Told(line=line, result=None, events=BEGUN))
    assert [step.name for step in run.steps] == ["dense", "cpu"]
