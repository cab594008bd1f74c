"""Options and arguments that several commands take, and how they print."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stages.runtime.artifacts import Store


def _model(name: str | None) -> str | None:
    from flows.names import checked_model

    return name if name is None else checked_model(name)


def _alias(name: str) -> str:
    from flows.names import checked_alias

    return checked_alias(name)


StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URI", help="Where artifacts live: a folder or s3://bucket/prefix. Default: $ENGINERY_STORE."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Change one value, as in steps.int8.params.scheme=int4_weight_only."
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that comes with enginery.")
]
ArtifactArgument = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A step's name, or the beginning of a fingerprint.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The beginning of a run's name, or `last`.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="The registered model's name.", callback=_model)]
AnyModelArgument = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="One model; all by default.", callback=_model)
]
AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.", callback=_alias)]

TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="Draw tokens; 0, the default, takes the likeliest."),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", metavar="N", help="Draw from the likeliest N alone; 0 for all.")
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Draw from the likeliest that together have probability P."),
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="X", help="Above 1, what was said comes less often.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed draws the same text.")]

WIDE = 130
"""Columns of a table that no terminal limits."""


def opened(store: str | None) -> Store:
    """The store that was asked for, with the environment set for libraries that keep files."""
    from flows.settings import enter, settle

    settings = settle(store=store)
    enter(settings)
    return settings.connect()


def looked_at(store: str | None) -> Store:
    """The store that was asked for, to read from: nothing is made or written, there or beside it.

    Raises:
        StageError: there is none.
    """
    from flows.settings import environment, settle

    found = settle(store=store).connect(reading=True)
    # torch makes this folder as soon as it is imported.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}")
    for name, value in environment(found.scratch).items():
        os.environ.setdefault(name, value)
    return found


def seconds(text: str) -> float:
    """A duration such as 0.5s, 30s, 5m, 1h, 90d, in seconds.

    Raises:
        StageError: it is none.
    """
    from stages.runtime.contract import StageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d|)", text)
    if not found:
        raise StageError(f"{text!r} is no duration", limit="a number with s, m, h or d, such as 30s")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def console() -> Console:
    """Standard output; wide where it is no terminal, so that a log keeps one row a line."""
    from rich.console import Console

    made = Console(highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(highlight=False, width=WIDE)


def show(shown: Table) -> None:
    """Print a table, or its rows one below the other where the terminal has no room for it."""
    from flows.reporting.narrow import fitting

    out = console()
    out.print(fitting(shown, out))


def say_json(value: Any) -> None:
    """Print a pydantic record as one JSON object."""
    typer.echo(value.model_dump_json(indent=1, by_alias=True))


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right)
    return made


def cells(*values: object) -> list[Any]:
    """Cells that are text and never markup: a recipe's words may hold brackets."""
    from rich.text import Text

    return [Text(str(value)) for value in values]


def absolute_source(text: str) -> str:
    """A source as it is named from any folder: a URI as it is, a path as a file:// URI.

    Raises:
        StageError: there is no such file or folder.
    """
    from stages.runtime.contract import StageError

    if "://" in text:
        return text
    path = Path(text).expanduser()
    if not path.exists():
        raise StageError(
            f"there is no file or folder {text!r}", remedy="Give a path that exists, or a URI such as hf://owner/name."
        )
    return path.absolute().as_uri()
