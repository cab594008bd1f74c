"""What MLflow's and Prefect's pages say of a run, whatever became of it."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import pytest

from flows.pipeline.pages import verdict_page
from flows.running.session import run_step
from stages.runtime.contract import StageError
from tests.flows.made_up import made_up
from tests.flows.pipeline.tiny_run import place, sealed  # noqa: F401

FAILING = "measure: perplexity, against: dense, at_most: 0.5"


def note(run):
    return run.data.tags["mlflow.note.content"]


def test_passed_run_is_finished_and_says_what_was_promoted(place):
    result = place.run()
    run = place.followed(result.run)
    assert run.info.status == "FINISHED" and note(run).startswith("**passed**")
    assert f"`{place.model}` version 1 as `champion`" in note(run)
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/"
    assert f"[report.html]({page}report.html)" in note(run) and f"[recipe.yaml]({page}recipe.yaml)" in note(run)
    assert f"enginery run recipe.yaml --store {result.store}" in note(run) and result.run in note(run)


def test_run_whose_gate_failed_is_failed_and_says_which_with_measured_and_limit(place):
    place.gates = (FAILING,)
    result = place.run()
    run = place.followed(result.run)
    assert run.info.status == "FAILED" and run.data.tags["enginery.verdict"] == "gate failed"
    (gate,) = [one for one in result.gates if not one.passed]
    assert (
        note(run).startswith("**gate failed**") and "measured 1, limit at most 0.5" in note(run) and gate.limit == 0.5
    )
    assert "report.html" in note(run)


def test_interrupted_run_is_killed_and_a_broken_one_failed_each_with_its_word(place):
    for error, status, said in (
        (KeyboardInterrupt(), "KILLED", "**interrupted**"),
        (StageError("no weights", measured=0, limit=1), "FAILED", "no weights; measured 0; limit 1"),
    ):
        with pytest.raises(type(error)), place.session() as session:
            run_step(session, "dense")
            raise error
        run = place.followed(place.record.name)
        assert run.info.status == status and said in note(run)
        assert "recipe.yaml" in note(run) and "report.html" not in note(run)


def test_two_runs_compare_by_the_recipes_params_and_what_was_judged(place):
    place.gates = (FAILING,)
    one, other = (place.followed(place.run(*sets).run) for sets in ((), ("gates.0.at_most=2",)))
    differing = {name for name, value in one.data.params.items() if other.data.params[name] != value}
    assert differing == {"gate.perplexity.against dense.at_most"} and one.data.params.keys() == other.data.params.keys()
    params = one.data.params
    assert (params["dense.source"], params["cpu.backend"], params["graph.inputs.model"]) == (
        "x://dense",
        "onnxruntime",
        "dense",
    )
    figures = one.data.metrics
    assert figures["cpu/perplexity.text"] == figures["dense/perplexity.text"] == figures["perplexity.text"] == 8
    assert figures["cpu/size_bytes"] == figures["size_bytes"] and "seconds" not in figures
    assert figures["gate/perplexity.cpu.text.against dense"] == 1 and float(one.data.tags["enginery.seconds"]) >= 0


def test_run_and_steps_name_the_texts_and_checkpoints_that_they_read(place):
    run = place.followed(place.run().run)
    read = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert {name: one.tags[0].value for name, one in read.items()} == {"dense": "checkpoint", "text": "test"}
    assert read["text"].dataset.source == '{"uri": "x://text"}' and len(read["text"].dataset.digest) == 36
    query = f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    steps = {one.info.run_name: one for one in place.client.search_runs([run.info.experiment_id], query)}
    assert [one.dataset.name for one in steps["graph"].inputs.dataset_inputs] == ["dense"]
    assert {one.dataset.name for one in steps["validate-cpu-text"].inputs.dataset_inputs} == {"dense", "text"}
    assert steps["dense"].inputs.dataset_inputs == []


def test_leftover_run_is_ended_as_its_record_says(place):
    result = place.run()
    run = place.followed(result.run)
    place.client.update_run(run.info.run_id, "RUNNING")
    place.client.set_tag(run.info.run_id, "mlflow.note.content", "")
    place.run()
    again = place.followed(result.run)
    assert again.info.status == "FINISHED" and note(again) == note(run)


def test_prefects_page_says_state_gates_and_where_mlflows_run_is():
    passed, failed = (made_up(passed=held)[0] for held in (True, False))
    page = verdict_page("tiny", failed, "http://mlflow/#/experiments/1/runs/2")
    assert page.startswith("# tiny: gate failed") and "[MLflow's run](http://mlflow/#/experiments/1/runs/2)" in page
    assert "measured 1.096, limit 1.1" in page
    assert verdict_page("tiny", passed, "mlflow ui").startswith("# tiny: passed")
    unjudged = verdict_page(
        "tiny",
        passed.model_copy(update={"gates": [], "verdict": "not judged"}),
        "mlflow ui --backend-store-uri sqlite:///x",
    )
    assert unjudged.startswith("# tiny: not judged") and "`mlflow ui --backend-store-uri sqlite:///x`" in unjudged
