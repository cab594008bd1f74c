"""The child that runs one stage: python -m stages NAME --work WORK.json --store URI.

Events go to standard output as JSON lines; the last is `sealed` (`part` or `units` where that is asked for) or `error`.
The child leads a process group. When its standard input closes it is killed, and what it started with it, so that no
orphan goes on after its parent was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pydantic import ValidationError

from stages import stage
from stages.adapters.connect import connect
from stages.runtime.contract import (
    DoesNotFit,
    Image,
    Interrupted,
    Metrics,
    Params,
    Stage,
    StageError,
    Unavailable,
    Work,
)
from stages.runtime.dividing import count_units, execute_part
from stages.runtime.ending import end_process
from stages.runtime.execute import Outcome, execute
from stages.runtime.fingerprint import ROOT
from stages.runtime.patience import be_patient
from stages.runtime.progress import JsonLines

CODES = {DoesNotFit: 3, Interrupted: 130}
_GUARD = "trap '' TERM INT HUP; while read -r line; do :; done; kill -s KILL 0"
"""Reads standard input to its end, then kills the process group that it is in. Only KILL ends it before."""


def main(argv: list[str] | None = None) -> int:
    """Run the stage; returns the exit code: 0, 1 error, 3 does not fit, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, required=True, help="JSON: work, params, step, force")
    parser.add_argument("--store", required=True, help="folder or s3:// URI")
    parser.add_argument("--scratch", type=Path, help="folder for drafts and views; default: beside the store")
    parser.add_argument("--part", type=_span, help="START:STOP: only these units of a stage whose work is divided")
    parser.add_argument("--units", action="store_true", help="only count the units of a stage whose work is divided")
    parser.add_argument("--orphan", action="store_true", help="go on when standard input closes")
    asked = parser.parse_args(argv)
    with _claimed_stdout() as stream, nullcontext() if asked.orphan else _guarded():
        return _answered(asked, JsonLines(stream))


def _answered(asked: argparse.Namespace, events: JsonLines) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    be_patient()
    try:
        order = json.loads(asked.work.read_text(encoding="utf-8"))
        definition = stage(asked.name)
        params, work = _understood(definition, order)
        definition = _lean(definition, params)
        store = connect(asked.store, asked.scratch)
        if asked.units:
            last: dict[str, Any] = {"event": "units", "count": count_units(definition, params, work, store)}
        elif asked.part:
            execute_part(definition, params, work, store, asked.part, events)
            last = {"event": "part", "start": asked.part.start, "stop": asked.part.stop}
        else:
            step, force = order.get("step", ""), order.get("force", False)
            last = _sealed(execute(definition, params, work, store, events, step=step, force=force))
    except KeyboardInterrupt:
        events.send(event="error", kind="Interrupted", what=f"{asked.name} was interrupted")
        return 130
    except StageError as error:
        events.send(event="error", **described(error))
        return CODES.get(type(error), 1)
    # Any other error: a person hears what broke and what to do; where in the code stands in the step's log.
    except Exception as error:  # noqa: BLE001
        traceback.print_exception(error)
        events.send(event="error", **described(defect(asked.name, error)))
        return 1
    events.send(**last)
    return 0


def _lean(definition: Stage[Any], params: Params) -> Stage[Any]:
    """The stage, but when it runs, after all checks, transformers comes without what no stage uses."""
    if definition.image_of(params) not in (Image.TORCH, Image.GPU):
        return definition

    def run(*given: Any) -> Metrics:
        from stages.models.memory.lean_import import import_transformers

        import_transformers()
        return definition.run(*given)

    return replace(definition, run=run)


def _sealed(outcome: Outcome) -> dict[str, Any]:
    return {"event": "sealed", "identity": outcome.identity, "cached": outcome.cached, "changed": outcome.changed}


def _span(text: str) -> range:
    start, _, stop = text.partition(":")
    span = range(int(start), int(stop))
    if not span or span.start < 0:
        raise ValueError(text)
    return span


def _understood(definition: Stage[Any], order: dict[str, Any]) -> tuple[Params, Work]:
    try:
        return definition.params.model_validate(order["params"]), Work.model_validate(order["work"])
    except ValidationError as error:
        first = error.errors()[0]
        raise StageError(
            f"the order for {definition.name} is not one that this version understands",
            measured=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            remedy="Build the image from the commit that plans the run.",
        ) from error


def described(error: StageError) -> dict[str, str | None]:
    """An error's four parts as JSON values."""
    return {
        "kind": type(error).__name__,
        "what": error.what,
        "measured": None if error.measured is None else str(error.measured),
        "limit": None if error.limit is None else str(error.limit),
        "remedy": error.remedy,
    }


def defect(what: str, error: Exception) -> StageError:
    """An error that nobody foresaw as one of ours: what broke, its type and text, and the last place in our code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    where = f" at {Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else ""
    text = (str(error).strip().splitlines() or ["no text"])[0]
    return StageError(
        f"{what} broke{where}: {type(error).__name__}: {text}",
        remedy="This is a defect: please report it with the recipe and the step's log. Steps that are sealed stay; the "
        "same command goes on behind them and breaks at the same place until this one or its params change.",
    )


def rebuilt(event: dict[str, str | None]) -> StageError:
    """The error that `described` wrote."""
    kinds = {kind.__name__: kind for kind in (StageError, DoesNotFit, Interrupted, Unavailable)}
    kind = kinds.get(event["kind"] or "", StageError)
    return kind(
        event["what"] or "", measured=event.get("measured"), limit=event.get("limit"), remedy=event.get("remedy") or ""
    )


def _claimed_stdout() -> TextIO:
    # Libraries print to descriptor 1 at will; events keep a copy of it and everything else goes to stderr.
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    return kept


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _guarded() -> Iterator[None]:
    """Have this process and what it starts killed once standard input closes, also where native code holds the GIL.

    A thread would wait for the GIL then. The kernel's own signal at a parent's death comes at the death of the thread
    that started the child, and to the child alone. So a process of its own does it, and a shell is the smallest.
    """
    if os.getpgrp() != os.getpid():  # else it would take along whoever started this
        os.setpgid(0, 0)
    guard = subprocess.Popen(["/bin/sh", "-c", _GUARD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        guard.kill()
        guard.wait()


if __name__ == "__main__":
    end_process(main())
