"""The command that opens the pages of an embedded store: ui."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from flows.commands.options import StoreOption, opened


def ui(
    store: StoreOption = None,
    prefect_port: Annotated[
        int, typer.Option("--prefect-port", metavar="N", min=0, max=65535, help="Prefect's port; 0: a free one.")
    ] = 0,
    mlflow_port: Annotated[
        int, typer.Option("--mlflow-port", metavar="N", min=0, max=65535, help="MLflow's port; 0: a free one.")
    ] = 0,
) -> None:
    """Open the pages of a store's runs, in Prefect and MLflow.

    Both are served on this machine alone, until Ctrl-C. Servers that $PREFECT_API_URL and $MLFLOW_TRACKING_URI name are
    not started: their addresses are printed.
    """
    found = opened(store)
    from flows.pages.servers import Wanted, show_pages

    def say(text: str) -> None:
        with suppress(OSError):  # a terminal that is closed
            typer.echo(text)

    ports = {"Prefect": prefect_port, "MLflow": mlflow_port}
    show_pages(Wanted(store=found.uri, scratch=found.scratch.absolute(), ports=ports, say=say))
