"""The engine that a registered model carries, for those who ask it without MLflow's own loading."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.tracking.connect import quiet
from flows.tracking.errors import Refused, answered
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import digest_file

SCHEME = "models:/"
_LITE = "sqlite:///"
_NONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's for a model or version that is not there, and for an alias."""


@contextmanager
def carried_engine(model: str) -> Iterator[Path]:
    """A folder with the engine of a registered model, every byte as it was judged, as long as the block lasts.

    Args:
        model: as MLflow names it, `models:/name@alias` or `models:/name/version`; $MLFLOW_TRACKING_URI is set.

    Raises:
        StageError: there is no such model, it is none of ours, or a file of it is not what was judged.
        Unavailable: MLflow does not answer.
    """
    uri = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ["MLFLOW_TRACKING_URI"]
    if uri.startswith(_LITE) and not Path(uri.removeprefix(_LITE)).is_file():
        raise StageError(  # MLflow would make an empty one
            f"there is no registered model {model}",
            measured=f"no database at {uri.removeprefix(_LITE)}",
            remedy="Name the store by --store, or MLflow by MLFLOW_TRACKING_URI.",
        )
    quiet()
    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="enginery-model-") as folder:
        try:
            with answered(uri):
                found = Path(download_artifacts(artifact_uri=model, dst_path=folder))
        except Refused as refused:
            if refused.code not in _NONE:
                raise
            raise StageError(
                f"there is no registered model {model}",
                measured=str(refused),
                remedy="`enginery models` lists models, versions and aliases.",
            ) from refused
        if not (found / "MLmodel").is_file():
            raise StageError(
                f"MLflow has lost the files of {model}",
                measured="no MLmodel",
                remedy="Run its recipe again: what is sealed is put there anew. Of a store that was moved "
                "`enginery reconcile` finds them where they are now.",
            )
        flavor = Model.load(str(found)).flavors.get("python_function", {})
        parts = {name: found / one["path"] for name, one in flavor.get("artifacts", {}).items()}
        if not {"engine", "digests"} <= parts.keys():
            raise StageError(
                f"{model} carries no engine",
                measured=", ".join(parts) or "no artifacts",
                remedy="Name a model of ours.",
            )
        for name, sha256 in json.loads(parts["digests"].read_text(encoding="utf-8")).items():
            here = parts["engine"] / name
            if not here.is_file() or digest_file(here) != sha256:
                raise StageError(
                    f"{name} of {model} is not what was judged",
                    measured=digest_file(here)[:12] if here.is_file() else "missing",
                    limit=sha256[:12],
                    remedy="Run the recipe again.",
                )
        yield parts["engine"]
