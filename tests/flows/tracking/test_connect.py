"""The connection: where it is, which experiment and registry, what is said of them."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import pytest

from flows.tracking.connect import Tracking, open_tracking
from stages.runtime.contract import StageError
from tests.flows.recorded import tracking_in


@pytest.mark.fault
def test_open_by_several_processes_at_first_use_migrates_once(tmp_path):
    script = "import sys; from pathlib import Path; from flows.tracking.connect import open_tracking\n"
    script += "print(open_tracking(Path(sys.argv[1])).experiment_id)"
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    ran = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(tmp_path / "new")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in ran]
    assert [process.returncode for process in ran] == [0, 0], said
    assert said[0] == said[1] and said[0][1] == ""


def test_open_prefers_the_environments_uri_and_keeps_artifacts_beside_scratch(tmp_path, monkeypatch):
    tracking_in(tmp_path / "a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/a/mlflow.db")
    tracking = open_tracking(tmp_path / "b", experiment="of the environment")
    assert tracking.uri.endswith("/a/mlflow.db") and not (tmp_path / "b" / "mlflow.db").exists()
    location = tracking.client.get_experiment(tracking.experiment_id).artifact_location
    assert location == (tmp_path / "b" / "mlartifacts").as_uri()
    assert tracking.link("1") == f"mlflow ui --backend-store-uri {tracking.uri}"
    assert Tracking(tracking.client, "http://h:5/", "7").link("1") == "http://h:5/#/experiments/7/runs/1"


def test_open_follows_mlflows_own_names_of_experiment_and_registry(tmp_path, monkeypatch):
    tracking_in(tmp_path / "registry")
    registry = f"sqlite:///{tmp_path}/registry/mlflow.db"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    made = tracking_in(tmp_path / "runs")
    assert made.client.get_experiment(made.experiment_id).name == "team" and made.registry_uri == registry
    assert f"--registry-store-uri {registry}" in made.link("1")
    made.client.create_registered_model("there")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    plain = tracking_in(tmp_path / "runs")
    assert plain.client.search_registered_models() == [] and plain.registry_uri == ""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", made.experiment_id)
    assert tracking_in(tmp_path / "runs").experiment_id == made.experiment_id != plain.experiment_id
    assert open_tracking(tmp_path, uri=plain.uri, experiment="bench").experiment_id != made.experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with pytest.raises(StageError, match=r"two experiments; measured \d+ is 'team'; limit 'another'"):
        tracking_in(tmp_path / "runs")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    with pytest.raises(StageError, match=r"no experiment of the id 4711.*MLFLOW_EXPERIMENT_NAME"):
        tracking_in(tmp_path / "runs")


def test_open_describes_its_own_experiment_and_no_other(tracking, monkeypatch, tmp_path):
    def about(name):
        made = tracking.client.get_experiment_by_name(name)
        return made.tags.get("mlflow.note.content", "")

    assert "compare two runs" in about("enginery")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    tracking.client.create_experiment("theirs")
    tracking.client.set_experiment_tag(tracking.experiment_id, "mlflow.note.content", "A person wrote this.")
    open_tracking(tmp_path, uri=tracking.uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    open_tracking(tmp_path, uri=tracking.uri)
    assert about("theirs") == "" and about("enginery") == "A person wrote this."


def test_open_beside_a_store_that_was_moved_finds_its_files_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before, after = tmp_path / "before #1", tmp_path / "after %"
    first = tracking_in(before)
    run = first.client.create_run(first.experiment_id).info.run_id
    first.client.log_text(run, "kept", "note.txt")
    before.rename(after)
    moved = open_tracking(after)
    assert moved.experiment_id == first.experiment_id
    assert Path(moved.client.download_artifacts(run, "note.txt")).read_text() == "kept"
    later = moved.client.create_run(moved.experiment_id).info
    moved.client.log_text(later.run_id, "new", "note.txt")
    assert later.artifact_uri.startswith((after / "mlartifacts").as_uri()) and not before.exists()
    assert open_tracking(after) == replace(moved, client=ANY)


def test_open_a_deleted_experiment_names_the_remedy(tracking):
    tracking.client.delete_experiment(tracking.experiment_id)
    with pytest.raises(StageError, match="mlflow experiments restore"):
        tracking_in(Path(tracking.uri.removeprefix("sqlite:///")).parent)


def test_open_a_file_store_is_refused_with_mlflows_text(tmp_path):
    with pytest.raises(StageError, match="MLflow at file:"):
        open_tracking(tmp_path, uri=(tmp_path / "runs").as_uri())


@pytest.mark.fault
def test_database_whose_making_was_killed_is_made_anew(tmp_path):
    """A kill at any of MLflow's migrations: half a database would block every later run."""

    def size(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:  # SQLite's journal comes and goes
            return 0

    code = "from pathlib import Path; from flows.tracking.connect import open_tracking\n"
    code += f"open_tracking(Path({str(tmp_path)!r}))"
    others = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    for half_bytes in (1, 200_000):
        making = subprocess.Popen([sys.executable, "-c", code], env=others)
        until = time.monotonic() + 60
        while not any(size(one) >= half_bytes for one in tmp_path.glob("mlflow.db.making-*")):
            assert making.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        making.kill()
        assert making.wait() < 0 and not (tmp_path / "mlflow.db").exists()
    subprocess.run([sys.executable, "-c", code], env=others, check=True, timeout=120)
    assert [one.name for one in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
    subprocess.run([sys.executable, "-c", code], env=others, check=True, timeout=120)
