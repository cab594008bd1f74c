"""The connection to MLflow: opened once, in the experiment and registry that MLflow's own variables name."""

from __future__ import annotations

import fcntl
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from flows.tracking.errors import MISSING, Refused, answered, answering
from flows.tracking.moved_store import follow
from stages.runtime.contract import StageError
from stages.runtime.lean_imports import uncollected

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

_LITE = "sqlite:///"
EXPERIMENT = "enginery"
NOTE = "mlflow.note.content"
"""The tag of an experiment or a run that MLflow's pages show as its description, in Markdown."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages show the runs of such an experiment as those of a training, with charts and a comparison."""
ABOUT = """\
Runs of Enginery: a recipe compresses a model step by step, judges what came of it
and promotes what held its gates.

- A run is a recipe run; its nested runs are the steps. Its description says what it came to, gate by gate.
- `Finished`: every gate held, or there was none. `Failed`: a gate did not hold, or a step broke. `Killed`: interrupted.
- To compare two runs, select both: the params are those of the recipe (`int8.scheme`), the metrics those of what was
  judged (`cpu/perplexity.text`; without an artifact's name those of the engine that an alias would serve).
"""
NOISE = (
    r"Type object <class 'prefect\.server\.",  # SQLAlchemy about Prefect's tables, when MLflow sets up all of a process
    r"The ``noload`` loader strategy is deprecated",  # SQLAlchemy about MLflow's own tables
    r".*Any type hint is inferred as AnyType",  # MLflow about a class of its own
    r".*An input example was not provided",  # the signature is stated, and an example would load the model
)
"""What MLflow's modules warn of and nobody here can mend."""


@dataclass(frozen=True)
class Tracking:
    """A place where runs are recorded and versions registered.

    Attributes:
        client: MLflow's client for it, whose errors are ours; safe to use from several threads.
        uri: where runs are recorded.
        experiment_id: where every run of ours lives.
        registry_uri: where versions are registered; empty where that is `uri`.
    """

    client: MlflowClient
    uri: str
    experiment_id: str
    registry_uri: str = ""

    def link(self, run_id: str) -> str:
        """Where a person sees a run: a page of the server, or the command that serves the embedded database.

        $ENGINERY_MLFLOW_PAGES is the address for people where that is not the one for programs.
        """
        if self.uri.startswith("http"):
            pages = os.environ.get("ENGINERY_MLFLOW_PAGES") or self.uri
            return f"{pages.rstrip('/')}/{self.page(run_id)}"
        registry = f" --registry-store-uri {self.registry_uri}" if self.registry_uri else ""
        return f"mlflow ui --backend-store-uri {self.uri}{registry}"

    def page(self, run_id: str, artifact: str = "") -> str:
        """A run's page, or that of a file of it, as a link from any of MLflow's pages."""
        file = f"/artifacts/{artifact}" if artifact else ""
        return f"#/experiments/{self.experiment_id}/runs/{run_id}{file}"


def open_tracking(scratch: Path, *, uri: str = "", experiment: str = "") -> Tracking:
    """Open MLflow, once, under a lock: SQLite's migrations race at first use.

    Versions are registered where $MLFLOW_REGISTRY_URI says, by default beside the runs.

    Args:
        scratch: folder of the embedded database and its artifacts.
        uri: where to record; by default $MLFLOW_TRACKING_URI, else SQLite below `scratch`.
        experiment: its name; by default that of $MLFLOW_EXPERIMENT_ID or $MLFLOW_EXPERIMENT_NAME, else `enginery`.

    Raises:
        StageError: the experiment was deleted, or its id is unknown.
        Unavailable: MLflow does not answer.
    """
    quiet()
    scratch.mkdir(parents=True, exist_ok=True)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{scratch.absolute() / 'mlflow.db'}"
    registry = os.environ.get("MLFLOW_REGISTRY_URI", "")
    registry = registry if registry != uri else ""
    with (scratch / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with answered(uri):
            for one in {uri, registry or uri}:
                _whole(one)
            plain = _client(uri, registry or uri)
        client = answering(plain, f"{uri}, with its registry at {registry}" if registry else uri)
        if registry:
            client.search_registered_models(max_results=1)
        known = _experiment(client, experiment)
        if isinstance(known, str):
            # A server keeps artifacts where it was told to; a bare database would put them below the working directory.
            remote = uri.startswith(("http://", "https://", "databricks"))
            location = None if remote else (scratch.absolute() / "mlartifacts").as_uri()
            tags = KIND if experiment else {**KIND, NOTE: ABOUT}
            return Tracking(client, uri, client.create_experiment(known, location, tags), registry)
        if uri == f"{_LITE}{scratch.absolute() / 'mlflow.db'}":
            follow(scratch.absolute() / "mlflow.db", known.artifact_location, scratch.absolute() / "mlartifacts")
    if known.lifecycle_stage != "active":
        raise StageError(
            f"MLflow's experiment {known.name!r} was deleted",
            remedy=f"Restore it: mlflow experiments restore -x {known.experiment_id}",
        )
    if known.name == EXPERIMENT and NOTE not in known.tags:
        client.set_experiment_tag(known.experiment_id, NOTE, ABOUT)
    return Tracking(client, uri, known.experiment_id, registry)


def _whole(uri: str) -> None:
    """Make a SQLite database that is not there yet under another name, and rename it into place.

    What a kill leaves in the midst of MLflow's migrations can neither go on nor begin again ("index already exists").
    """
    path = Path(uri.removeprefix(_LITE))
    if not uri.startswith(_LITE) or "?" in uri or not path.parent.is_dir() or path.exists():
        return
    for left in path.parent.glob(f"{path.name}.making-*"):
        left.unlink()
    mark = f".making-{uuid4().hex}"  # never twice in a process: MLflow keeps what it has opened
    _client(uri + mark, uri + mark)
    path.with_name(path.name + mark).rename(path)


def _client(uri: str, registry: str) -> MlflowClient:
    with uncollected():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=registry)


def _experiment(client: MlflowClient, asked: str) -> Experiment | str:
    """The experiment that is asked for, or the name of the one to create."""
    number = "" if asked else os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    named = asked or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    if not number:
        return client.get_experiment_by_name(named or EXPERIMENT) or named or EXPERIMENT
    try:
        known = client.get_experiment(number)
    except Refused as error:
        if error.code != MISSING:
            raise
        raise StageError(
            f"MLflow has no experiment of the id {number}",
            remedy="Correct MLFLOW_EXPERIMENT_ID, or name the experiment by MLFLOW_EXPERIMENT_NAME instead.",
        ) from error
    if named and known.name != named:
        raise StageError(
            "MLFLOW_EXPERIMENT_ID and MLFLOW_EXPERIMENT_NAME name two experiments",
            measured=f"{number} is {known.name!r}",
            limit=repr(named),
            remedy="Unset one of them.",
        )
    return known


def quiet() -> None:
    """Keep MLflow from calling home, looking for git, telling of its migrations and of examples. Call before import.

    It also asks a server that is away for four minutes by itself, each time and deaf to a deadline; a run has one of
    its own, and Ctrl-C must not wait for that.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    for name in ("mlflow.store.db.utils", "alembic", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
