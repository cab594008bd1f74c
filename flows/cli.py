"""The `enginery` command. This module and `flows.commands` import typer alone, so that help is there at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands import (
    catalog,
    chat,
    check,
    compare,
    deploy,
    export_to,
    generate,
    init,
    inspect,
    manage,
    run,
    serve,
    ui,
    watch,
)
from flows.running import interruption

if TYPE_CHECKING:
    from stages.runtime.contract import StageError

app = typer.Typer(
    name="enginery",
    help="Turn a Transformer checkpoint into a smaller, faster engine, prove that it is still good, and promote it.",
    epilog="Exit codes: 0 as asked, 1 error, 2 a gate failed, 3 does not fit this machine, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _command in (
    *(check.check, init.init, run.plan, run.run, run.recipes),
    *(watch.watch, watch.hooks, deploy.deploy, ui.ui),
    *(inspect.runs, inspect.ls, inspect.inspect, inspect.explain, compare.compare, inspect.logs, inspect.verify),
    *(catalog.models, catalog.stages, generate.generate, chat.chat, serve.serve, export_to.export_to),
    *(manage.cancel, manage.promote, manage.rollback, manage.reconcile, manage.sweep, manage.doctor),
):
    app.command()(_command)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """See `app`'s help; both options are read by `main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    asked = list(sys.argv[1:] if argv is None else argv)
    if asked[:1] == ["--version"]:
        typer.echo(_version())
        return 0
    debug = "--debug" in asked
    asked = [word for word in asked if word != "--debug"]
    try:
        code: Any = app(asked or ["--help"], prog_name="enginery", standalone_mode=False)
    except typer.TyperException as error:
        sys.stderr.write(f"error: {error.format_message()} `enginery --help` and `enginery COMMAND --help` say more.\n")
        return 1
    except typer.Abort:
        code = interruption.CODE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # Whatever it is, a person hears it in one line.
    except Exception as error:
        if interruption.asked() and not isinstance(error, _stage_error()):
            raise  # Python made another error of an interrupt
        return _said(error, debug=debug)
    if code == interruption.CODE:
        interruption.unwinding()
        interruption.say()
    return int(code or 0)


def _said(error: Exception, *, debug: bool) -> int:
    """Tell a person of an error; returns the exit code. No traceback unless it was asked for."""
    foreseen = isinstance(error, _stage_error())
    code = _code(error) if foreseen else 1
    if code == interruption.CODE:
        interruption.unwinding()
        interruption.say(f"interrupted: {error}; the same command goes on from there\n")
        return code
    if debug:
        traceback.print_exception(error)
    if foreseen:
        lines = str(error).splitlines()
    else:
        text = (str(error).strip().splitlines() or ["no text"])[0]
        lines = [
            f"{type(error).__name__}: {text}. This is a defect: please report it with the command; "
            "`enginery --debug` shows where it arose."
        ]
    for line in lines:
        sys.stderr.write(f"error: {line}\n")
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("enginery")
    except PackageNotFoundError:
        return "0.0.0+source"


def _stage_error() -> type[StageError]:
    # Evaluated only when something was raised: importing the contract costs as much as all of typer.
    from stages.runtime.contract import StageError

    return StageError


def _code(error: Exception) -> int:
    from stages.runtime.contract import DoesNotFit, Interrupted

    return 3 if isinstance(error, DoesNotFit) else 130 if isinstance(error, Interrupted) else 1
