"""The command serve: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.asked import AskedArgument, asked_folder, opened
from flows.commands.options import StoreOption


def serve(
    model: AskedArgument,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Where to listen. Whoever reaches it may ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=1, max=1024, help="Write at most so many answers at once.")
    ] = 8,
    queue: Annotated[
        int,
        typer.Option("--queue", metavar="N", min=1, max=1_000_000, help="Let at most so many prompts wait for a row."),
    ] = 64,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What clients call the model. Default: by MODEL."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Serve a model as OpenAI's API has it, until Ctrl-C.

    Completions and conversations, whole or streamed, of many clients at once; embeddings, where the model gives
    vectors. /health and /metrics say how it is.
    """
    from flows.endpoint.server import Served, serve

    def say(text: str) -> None:
        with suppress(OSError):  # a terminal that is closed
            typer.echo(text)

    with asked_folder(model, store) as (folder, verified):
        engine = opened(folder, verified=verified)
        called = name or _name(model)
        serve(Served(model=engine, name=called, host=host, port=port, rows=rows, queue=queue), say)


def _name(model: str) -> str:
    """A registered model's own name, a folder's, or what was said."""
    registered = re.match(r"models:/([^/@]+)", model)
    if registered:
        return registered[1]
    return Path(model).resolve().name if Path(model).is_dir() else model
