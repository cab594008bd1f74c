"""MLflow's server on a store's own database: python -m flows.pages.mlflow_server.

`mlflow server` would start the same application in a child of its own and stay beside it, at twice the memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Route

from flows.pages.links import as_training
from flows.pages.serving import below, end_with_parent, serve
from stages.runtime.contract import StageError

if TYPE_CHECKING:
    from flows.tracking.connect import Tracking

_LOOK_S = 5.0
_LOG = logging.getLogger("enginery.pages")


def main(descriptor: str, scratch: str, store: str) -> None:
    """Serve a socket; $MLFLOW_TRACKING_URI is the database.

    Args:
        descriptor: of the socket that listens.
        scratch: folder of the embedded database and its artifacts.
        store: its URI.
    """
    end_with_parent()
    from flows.tracking.connect import open_tracking

    # It brings the database up to date under the lock that runs take, and makes the experiment with its own folder.
    tracking = open_tracking(Path(scratch))
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR, REGISTRY_STORE_URI_ENV_VAR

    os.environ[BACKEND_STORE_URI_ENV_VAR] = tracking.uri
    os.environ[ARTIFACT_ROOT_ENV_VAR] = (Path(scratch).absolute() / "mlartifacts").as_uri()
    if tracking.registry_uri:
        os.environ[REGISTRY_STORE_URI_ENV_VAR] = tracking.registry_uri
    from mlflow.server.fastapi_app import app

    async def runs(_request: Request) -> RedirectResponse:
        return RedirectResponse(as_training(f"/#/experiments/{tracking.experiment_id}/runs"))

    serve(below(app, [Route("/runs", runs)]), int(descriptor), _end_killed(tracking, Path(scratch), store))


async def _end_killed(tracking: Tracking, scratch: Path, store: str) -> None:
    """A run that was killed stands as running until someone says that it does not."""
    from flows.running.tracked_run import end_killed

    while True:
        try:
            await asyncio.to_thread(end_killed, tracking, scratch, store)
        except StageError as error:
            _LOG.warning("%s", error)
        await asyncio.sleep(_LOOK_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
