"""Prefect's server on a store's own database, and the mirror of the store's runs: python -m flows.pages.prefect_server.

One process for both: the mirror writes with the server's models, on its connections.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flows.pages.serving import below, end_with_parent, serve


def main(descriptor: str, scratch: str, mlflow: str) -> None:
    """Serve a socket.

    Args:
        descriptor: of the socket that listens.
        scratch: folder of the records.
        mlflow: the address of MLflow's pages.
    """
    end_with_parent()
    from prefect.server.api.server import create_app

    from flows.pages.links import routes
    from flows.pages.mirror import Mirror

    # No scheduler, no automations, no telemetry: nothing runs here, and what ran is told by its record.
    prefect = create_app(webserver_only=True, final=True)
    serve(below(prefect, routes(Path(scratch), mlflow)), int(descriptor), Mirror(Path(scratch)).follow())


if __name__ == "__main__":
    main(*sys.argv[1:])
