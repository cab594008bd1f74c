"""The flow on a real Prefect server: what a flow run and its task runs end as."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import httpx
import pytest

from flows.pipeline import optimize, steps
from flows.running import session
from stages.runtime.contract import Interrupted, StageError
from tests.flows.pipeline.tiny_run import place, sealed  # noqa: F401 - fixtures
from tests.flows.prefect_server import eventually, prefect_api  # noqa: F401 - a fixture


def newest(api, kind, **asked):
    """The flow run that began last, or its task runs."""
    found = httpx.post(f"{api}/{kind}/filter", json={"sort": "EXPECTED_START_TIME_DESC", "limit": 50, **asked})
    return found.raise_for_status().json()


def ended(api):
    (run, *_) = newest(api, "flow_runs")
    return run["name"], run["state_type"], run["state"]["message"] or ""


def steps_of(api, count):
    (run, *_) = newest(api, "flow_runs")
    asked = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    eventually(lambda: len(newest(api, "task_runs", **asked)) == count)
    return {one["name"]: one["state_type"] for one in newest(api, "task_runs", **asked)}


def breaking(step, error, begun):
    """What runs a step, but for one that breaks; `begun` has the names of those that were begun."""

    def run(given, name, *listeners):
        begun.append(name)
        if name == step:
            raise error
        return session.run_step(given, name, *listeners)

    return run


def test_flow_run_ends_as_its_run_does(prefect_api, place):
    result = place.run()
    assert result.passed
    assert ended(prefect_api)[:2] == ("tiny", "COMPLETED")
    assert set(steps_of(prefect_api, 6).values()) == {"COMPLETED"}
    place.gates = ("measure: perplexity, against: dense, at_most: 0.5",)
    result = place.run()
    assert not result.passed
    _, state, message = ended(prefect_api)
    assert state == "FAILED"
    assert "perplexity" in message and "0.5" in message and "gate failed" in message


def test_flow_run_whose_step_breaks_is_failed_with_its_error(prefect_api, place, monkeypatch):
    monkeypatch.setattr(optimize, "run_step", breaking("graph", StageError("the graph is not one"), []))
    with pytest.raises(StageError, match="the graph is not one"):
        place.run()
    _, state, message = ended(prefect_api)
    assert state == "FAILED" and "the graph is not one" in message and place.state == "error"


def test_flow_run_whose_gate_names_no_slice_is_failed_before_it_is_judged(prefect_api, place):
    place.gates = ("measure: perplexity, corpus: text, slice: topcs, at_most: 9",)
    with pytest.raises(StageError, match="Did you mean 'topics'"):
        place.run()
    _, state, message = ended(prefect_api)
    assert state == "FAILED" and "slice 'topcs' of text" in message


def test_flow_run_that_a_person_ends_is_cancelled(prefect_api, place, monkeypatch):
    def asked(given, futures):
        for future in futures.values():
            future.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "run_step", breaking("graph", Interrupted("step graph was stopped"), []))
    monkeypatch.setattr(optimize, "_await", asked)
    with pytest.raises(KeyboardInterrupt):
        place.run()
    assert ended(prefect_api)[1:] == ("CANCELLED", "interrupted: what is sealed stays")
    assert place.state == "interrupted" and place.followed(place.record.name).info.status == "KILLED"


def test_form_asks_for_what_a_person_may_say_and_no_more():
    shown = set(optimize.optimize_recipe.parameters.properties)
    assert shown == {"recipe", "sets", "force", "from_step"}


def test_steps_that_read_a_broken_one_are_not_begun_and_the_error_is_its_own(place, monkeypatch):
    begun = []
    monkeypatch.setattr(steps, "run_step", breaking("dense", StageError("no such checkpoint"), begun))
    with pytest.raises(StageError, match="no such checkpoint"):
        place.run()
    assert "graph" not in begun and place.state == "error"
