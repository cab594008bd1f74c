"""What a person means by MODEL, and the folder that it lies in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import looked_at

if TYPE_CHECKING:
    from stages.serving.engine import Answerer

AskedArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder of an artifact, a step's name, the beginning of a fingerprint, or models:/NAME@ALIAS.",
    ),
]


def opened(folder: Path, *, verified: bool) -> Answerer:
    """What is asked, with an end: a checkpoint whose positions have none reads what an engine of it would.

    Raises:
        StageError: see `stages.serving.engine.open_engine`.
    """
    from stages.models.anatomy.tasks import longest_text
    from stages.models.checkpoint.json_files import read_json
    from stages.serving.engine import ENDLESS, open_engine

    engine = open_engine(folder, verified=verified)
    if engine.maximum_tokens < ENDLESS:
        return engine
    said = read_json(folder / "tokenizer_config.json", optional=True).get("model_max_length")
    return replace(engine, maximum_tokens=longest_text(said))


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
