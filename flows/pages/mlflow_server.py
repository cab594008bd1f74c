"""MLflow's server on a store's own database: python -m flows.pages.mlflow_server.

`mlflow server` would start the same application in a child of its own and stay beside it, at twice the memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.pages.serving import serve
from flows.tracking.connect import open_tracking


def main(descriptor: str, scratch: str) -> None:
    """Serve a socket; $MLFLOW_TRACKING_URI is the database.

    Args:
        descriptor: of the socket that listens.
        scratch: folder of the embedded database and its artifacts.
    """
    # It brings the database up to date under the lock that runs take, and makes the experiment with its own folder.
    tracking = open_tracking(Path(scratch))
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR, REGISTRY_STORE_URI_ENV_VAR

    os.environ[BACKEND_STORE_URI_ENV_VAR] = tracking.uri
    os.environ[ARTIFACT_ROOT_ENV_VAR] = (Path(scratch).absolute() / "mlartifacts").as_uri()
    if os.environ.get("MLFLOW_REGISTRY_URI"):
        os.environ[REGISTRY_STORE_URI_ENV_VAR] = os.environ["MLFLOW_REGISTRY_URI"]
    from mlflow.server.fastapi_app import app

    serve(app, int(descriptor))


if __name__ == "__main__":
    main(*sys.argv[1:])
