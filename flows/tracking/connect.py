"""The connection to MLflow: opened once, its errors as ours, its noise kept out."""

from __future__ import annotations

import fcntl
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.contract import StageError, Unavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "enginery"
NOISE = (
    r"Type object <class 'prefect\.server\.",  # SQLAlchemy about Prefect's tables, when MLflow sets up all of a process
    r"The ``noload`` loader strategy is deprecated",  # SQLAlchemy about MLflow's own tables
    r".*Any type hint is inferred as AnyType",  # MLflow about a class of its own
    r".*An input example was not provided",  # the signature is stated, and an example would load the model
)
"""What MLflow's modules warn of and nobody here can mend."""
PASSING = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"})


@dataclass(frozen=True)
class Tracking:
    """A place where runs are recorded.

    Attributes:
        client: MLflow's client for `uri`; safe to use from several threads.
        uri: tracking and registry URI.
        experiment_id: where every run of ours lives.
    """

    client: MlflowClient
    uri: str
    experiment_id: str

    def link(self, run_id: str) -> str:
        """Where a person sees a run: a page of the server, or the command that serves the embedded database.

        $ENGINERY_MLFLOW_PAGES is the address for people where that is not the one for programs.
        """
        if self.uri.startswith("http"):
            pages = os.environ.get("ENGINERY_MLFLOW_PAGES") or self.uri
            return f"{pages.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"mlflow ui --backend-store-uri {self.uri}"


def open_tracking(scratch: Path, *, uri: str = "", experiment: str = EXPERIMENT) -> Tracking:
    """Open MLflow, once, under a lock: SQLite's migrations race at first use.

    Args:
        scratch: folder of the embedded database and its artifacts.
        uri: where to record; by default $MLFLOW_TRACKING_URI, else SQLite below `scratch`.
        experiment: its name.

    Raises:
        Unavailable: MLflow does not answer.
    """
    quiet()
    from mlflow import MlflowClient

    scratch.mkdir(parents=True, exist_ok=True)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{scratch.absolute() / 'mlflow.db'}"
    # A server keeps artifacts where it was told to; a bare database would put them below the working directory.
    remote = uri.startswith(("http://", "https://", "databricks"))
    location = None if remote else (scratch.absolute() / "mlartifacts").as_uri()
    with (scratch / "mlflow.lock").open("w") as lock, answered(uri):
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            return Tracking(client, uri, client.create_experiment(experiment, artifact_location=location))
    if known.lifecycle_stage != "active":
        raise StageError(
            f"MLflow's experiment {experiment!r} was deleted",
            remedy=f"Restore it: mlflow experiments restore -x {known.experiment_id}",
        )
    return Tracking(client, uri, known.experiment_id)


@contextmanager
def answered(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into ours: Unavailable where a retry may help, else StageError with its text."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in PASSING:
            raise Unavailable(
                f"MLflow at {uri} does not answer as it should ({error})",
                remedy="Start it and see its log, or unset MLFLOW_TRACKING_URI to record in the embedded database.",
            ) from error
        raise StageError(f"MLflow at {uri} refused: {error}") from error


def quiet() -> None:
    """Keep MLflow from calling home, from looking for git and from telling of its migrations. Call before import."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
