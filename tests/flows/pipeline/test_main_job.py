"""The main job on the tiny Llama through the command line: every stage, Prefect, MLflow and the registry for real."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from flows.commands.schema import FOLDER
from stages.adapters.connect import connect
from stages.runtime.fingerprint import ROOT

JOB, CUT = Path(__file__).with_name("job.yaml"), Path(__file__).with_name("cut.yaml")
PLAIN = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
KEPT = {k: v for k, v in os.environ.items() if k.startswith(("COVERAGE_", "COV_"))}

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1200)]  # a whole run of every stage, beside other tests


def enginery(*arguments, home, code=0, env=None, cwd=None, timeout=560, through=("flows",)):
    """Run the command in a child; returns (JSON object or None, output, errors)."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, (*through, *arguments))],
        env={**PLAIN, **KEPT, "HOME": str(home), "PYTHONPATH": str(ROOT), **(env or {})},
        cwd=cwd or home,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stdout[done.stdout.find("{") :] if "--json" in arguments else ""
    return (json.loads(last) if last else None), done.stdout, done.stderr


def steps(result):
    return {step["name"]: step for step in result["steps"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def common(home, tiny):
    return [JOB, "--store", home / "store", "--set", f"steps.dense.params.source={tiny}"]


@pytest.fixture(scope="module")
def first(common, home):
    through = ("tests.flows.walk", home / "walk.json")
    return enginery("run", *common, "--json", "--output", home / "out", home=home, through=through)[0]


def test_run_whole_recipe_passes_and_fits_its_schema(first):
    schema = json.loads((FOLDER / "run.json").read_text())
    jsonschema.validate(first, schema)
    assert first["passed"]
    assert not any(step["cached"] for step in first["steps"])
    assert first["model"]["version"] == "1"
    assert first["model"]["targets"] == ["onnxruntime:cpu"]
    assert any("sm_89" in one for one in first["compiled"])
    assert Path(first["report"]).stat().st_size < 1_000_000


def test_run_enters_each_room_once_on_its_way_and_the_recipe_only_before_the_pipeline(first, home):
    walked = json.loads((home / "walk.json").read_text())
    assert walked["rooms"] == [
        "commands",
        "running",  # on which GPU plans are judged is asked before the recipe is read: its steps depend on it
        "recipe",
        "pipeline",  # --output is looked at before anything runs
        "reporting",  # and the terminal is opened
        "prefect_api",
        "registry",  # the champion is looked up before it is planned to be measured
        "tracking",
        "judging",
    ]
    assert walked["late"] == []
    # What starts a run without a person, what a team's Prefect is given, who looks at it and what serves its result
    # are no part of this one.
    others = {path.parent.name for path in Path(ROOT, "flows").glob("*/__init__.py")} - set(walked["rooms"])
    assert others == {"triggers", "production", "pages", "endpoint"}


def test_run_share_and_prune_each_removed_a_twentieth_by_the_tensors(first):
    for name in ("shared", "pruned"):
        metrics = steps(first)[name]["metrics"]
        assert metrics["block_parameters"] <= 0.95 * metrics["block_parameters_before"]


def test_run_output_holds_copies_of_both_engines(first, home):
    for name in ("cpu", "gpu"):
        engine = json.loads((home / "out" / name / "engine.json").read_text())
        assert (home / "out" / name / engine["executable"]).stat().st_size > 0


def test_run_again_everything_cached_and_no_new_version(first, common, home):
    again = enginery("run", *common, "--json", home=home)[0]
    assert all(step["cached"] for step in again["steps"])
    assert again["model"]["version"] == first["model"]["version"]
    assert [s["fingerprint"] for s in again["steps"]] == [s["fingerprint"] for s in first["steps"]]


def test_run_same_bytes_elsewhere_read_only_home_all_hit(first, home, tiny, tmp_path):
    copy = tmp_path / "another" / "place"
    shutil.copytree(tiny, copy)
    arguments = [JOB, "--store", home / "store", "--set", f"steps.dense.params.source={copy}", "--json"]
    nowhere = tmp_path / "home"
    nowhere.write_text("a file where a home should be: nothing can be written below it")
    again = enginery("run", *arguments, home=nowhere, cwd=tmp_path, env={"PIP_NO_INDEX": "1"})[0]
    assert all(step["cached"] for step in again["steps"])


def test_run_gate_that_cannot_hold_exits_2_and_moves_nothing(first, common, home):
    arguments = [*common, "--set", "gates.0.at_most=0.5", "--json"]
    failed, _, errors = enginery("run", *arguments, home=home, code=2)
    assert all(step["cached"] for step in failed["steps"]), "a changed gate reran a step"
    assert failed["model"] is None
    gate = next(one for one in failed["gates"] if not one["passed"])
    assert gate["measure"] == "perplexity"
    assert gate["limit"] == 0.5
    assert "perplexity" in errors
    assert "0.5" in errors
    head = sorted((home / "store" / "promotions" / "tiny").glob("????????.json"))  # entries, not the notes beside
    assert len(head) == 1
    with sqlite3.connect(home / "store" / "state" / "mlflow.db") as database:
        assert database.execute("select version from registered_model_aliases").fetchall() == [(1,)]


def test_plan_changed_quantize_names_the_field_and_only_what_follows(first, common, home):
    plan = enginery("plan", *common, "--set", "steps.int8.params.scheme=int8_weight_only", "--json", home=home)[0]
    missed = {line["name"]: line["why"] for line in plan["steps"] if not line["hit"]}
    assert "params.scheme: int8_w8a8 -> int8_weight_only" in missed["int8"]
    assert {"graph", "gpu", "cpu"} <= set(missed)
    assert not {"dense", "text", "shared", "pruned", "healed", "validate-dense-text"} & set(missed)


def test_registered_model_answers_far_from_the_project(first, home, tmp_path):
    code = (
        "import sys, mlflow; sys.path[:] = [p for p in sys.path if 'site-packages' in p or 'lib/python' in p]\n"
        "model = mlflow.pyfunc.load_model('models:/tiny@champion')\n"
        "print(repr(model.predict(['The import statement'])))"
    )
    env = {**PLAIN, "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{home}/store/state/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = eval(done.stdout.strip().splitlines()[-1])
    assert len(answers) == 1
    assert len(answers[0]) > 10


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
def test_mlflow_holds_a_parent_and_a_child_for_each_step(first, home):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/store/state/mlflow.db")
    experiment = client.get_experiment_by_name("enginery")
    runs = client.search_runs([experiment.experiment_id], f"tags.`enginery.run` = '{first['run']}'")
    children = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{runs[0].info.run_id}'", max_results=100
    )
    assert {run.info.run_name for run in children} == set(steps(first))
    healed = next(run for run in children if run.info.run_name == "healed")
    assert len(client.get_metric_history(healed.info.run_id, "kl")) > 3
    assert healed.data.tags["enginery.fingerprint"] == steps(first)["healed"]["fingerprint"]


def recover_child(parent: int) -> int | None:
    """The process that runs `recover` below a run, by its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat[1]) == parent and b"recover" in words:
            return int(folder.name)
    return None


def test_recover_killed_goes_on_and_ends_in_the_same_bytes(first, home, tiny, tmp_path):
    changed = ["--set", f"steps.dense.params.source={tiny}"]
    whole = enginery("run", CUT, "--store", home / "store", *changed, "--json", home=home)[0]
    arguments = [sys.executable, "-m", "flows", "run", str(CUT), "--store", str(tmp_path / "store"), *changed]
    env = {**PLAIN, **KEPT, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(arguments, env=env, stdout=log, stderr=log, start_new_session=True)
        partial: list[Path] = []
        deadline = time.monotonic() + 150
        while not partial and time.monotonic() < deadline:
            time.sleep(0.02)
            child = recover_child(run.pid)
            if child:
                partial = list((tmp_path / "store/state/drafts").glob("*/.partial/state.safetensors"))
        assert partial, (tmp_path / "log").read_text()
        os.kill(child, signal.SIGKILL)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    sealed = {name for name, _ in connect(str(tmp_path / "store")).manifests()}
    resumed = enginery("run", CUT, "--store", tmp_path / "store", *changed, "--json", home=home)[0]
    for step in resumed["steps"]:
        assert step["cached"] == (step["fingerprint"] in sealed), step["name"]
    assert not steps(resumed)["healed"]["cached"]
    log = next((tmp_path / "store/state/runs").glob(f"{resumed['run']}/log.jsonl")).read_text()
    assert "goes on from step" in log
    one, other = (connect(str(where)).manifest(steps(r)["healed"]["fingerprint"])
                  for where, r in ((home / "store", whole), (tmp_path / "store", resumed)))  # fmt: skip
    assert one.files == other.files
    assert one.metrics["steps"] == other.metrics["steps"]


def test_run_failing_step_is_one_line_and_what_was_sealed_stays(home, tiny, tmp_path):
    arguments = [CUT, "--store", tmp_path / "store", "--set", f"steps.dense.params.source={tiny}"]
    # What a text is too short for is seen when it is read.
    little = {"text.params.passage_characters": 200, "text.params.splits.calibrate": 0.0005}
    for field, value in {**little, "pruned.params.window_tokens": 256}.items():
        arguments += ["--set", f"steps.{field}={value}"]
    _, _, errors = enginery("run", *arguments, home=home, code=1)
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "shorter than one window" in said[0]
    kinds = {manifest.kind for _, manifest in connect(str(tmp_path / "store")).manifests()}
    assert "checkpoint" in kinds
    runs = enginery("runs", "--store", tmp_path / "store", "--json", home=home)[0]
    assert runs["runs"][-1]["state"] == "error"


def test_run_that_mlflow_cannot_follow_is_ended_by_its_error_in_the_middle_of_a_step(home, tiny, tmp_path):
    arguments = [CUT, "--store", tmp_path / "store", "--set", f"steps.dense.params.source={tiny}"]
    _, _, errors = enginery("run", *arguments, home=home, code=1, env={"MLFLOW_EXPERIMENT_ID": "999"})
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "MLflow has no experiment of the id 999" in said[0]
    (run,) = enginery("runs", "--store", tmp_path / "store", "--json", home=home)[0]["runs"]
    assert run["state"] == "error" and "999" in run["error"]
    kinds = {manifest.kind for _, manifest in connect(str(tmp_path / "store")).manifests()}
    assert "engine" not in kinds
