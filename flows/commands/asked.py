"""What a person means by MODEL, and the folder that it lies in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import looked_at

AskedArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder of an artifact, a step's name, the beginning of a fingerprint, or models:/NAME@ALIAS.",
    ),
]


@contextmanager
def asked_folder(model: str, store: str | None) -> Iterator[tuple[Path, bool]]:
    """The folder that is meant, as long as the block lasts, and whether its bytes were verified."""
    from flows.registry.carried import SCHEME, carried_engine
    from flows.reporting.inspect_artifact import find_artifact
    from stages.runtime.looking import looked_into

    if model.startswith(SCHEME):
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            looked_at(store)
        with carried_engine(model) as engine:
            yield engine, True
    elif Path(model).is_dir():
        yield Path(model), False
    else:
        found = looked_at(store)
        with looked_into(found, find_artifact(found, model)) as (folder, _):
            yield folder, True
