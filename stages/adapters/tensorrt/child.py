"""A plan is built in a process of its own: a builder that crashes or never ends takes nothing else along.

`python -m stages.adapters.tensorrt.child` is that process. It reads what is asked from its standard input as JSON and
answers on its standard output, a line of JSON for each thing that it says; the plan goes into a file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from stages.adapters.tensorrt.build import Shapes, build_plan
from stages.runtime.contract import DoesNotFit, Interrupted, Progress, StageError
from stages.runtime.ending import end_process
from stages.runtime.fingerprint import ROOT
from stages.runtime.peak_memory import peak_rss_bytes, tell_peak_beside

MINUTES, DEFAULT_MINUTES = "ENGINERY_BUILD_MINUTES", 60.0
_KINDS = {kind.__name__: kind for kind in (StageError, DoesNotFit, Interrupted)}


def build(
    graph: Path, backend: str, architectures: Sequence[str], shapes: Shapes, target: Path, progress: Progress
) -> None:
    """Write a plan, as `build_plan` makes it, in a child.

    Args:
        graph: as the rest, see `build_plan`.
        backend: as the rest.
        architectures: as the rest.
        shapes: as the rest.
        target: the plan's file.
        progress: hears what the child says.

    Raises:
        StageError: as `build_plan`; or the child crashed.
        DoesNotFit: as `build_plan`; or memory or time ran out.
    """
    asked = {
        "graph": str(graph.absolute()), "backend": backend, "architectures": [*architectures],
        "shapes": asdict(shapes), "target": str(target.absolute()),
    }  # fmt: skip
    minutes = _minutes()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    clock = threading.Timer(60 * minutes, end)
    clock.daemon = True
    clock.start()
    try:
        with child:
            try:
                _heard(child, asked, progress)
            except BaseException:
                child.kill()
                raise
    finally:
        clock.cancel()
    if late.is_set():
        raise DoesNotFit(
            f"{backend} built no engine in the time it has",
            measured=f"more than {minutes:g} minutes",
            limit=f"{minutes:g} minutes",
            remedy=f"Set ${MINUTES} higher, or ask for fewer architectures or a smaller `maximum_tokens`.",
        )
    if child.returncode:
        raise _crashed(backend, child.returncode)


def _minutes() -> float:
    said = os.environ.get(MINUTES, "") or str(DEFAULT_MINUTES)
    try:
        minutes = float(said)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise StageError(f"${MINUTES} is no number of minutes", measured=said, remedy=f"Say {DEFAULT_MINUTES:g}.")
    return minutes


def _heard(child: subprocess.Popen[str], asked: dict[str, Any], progress: Progress) -> None:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(asked))
    child.stdin.close()
    for line in child.stdout:
        said = json.loads(line)
        if "kind" in said:
            raise _KINDS[said.pop("kind")](said.pop("what"), **said)
        if "note" in said:
            progress.note(said["note"])
        elif "peak_bytes" in said:
            tell_peak_beside(said["peak_bytes"])
        else:
            progress.advanced(said["done"], 1.0)


def _crashed(backend: str, code: int) -> StageError:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        return DoesNotFit(
            f"{backend} was ended while it built the engine",
            measured=how,
            remedy="The system does that when memory runs out: free some, or take a larger machine.",
        )
    return StageError(
        f"{backend} crashed while it built the engine",
        measured=how,
        remedy="What it printed stands in the step's log. Ask for fewer architectures, or report it to NVIDIA.",
    )


class _Says:
    """A listener that writes lines of JSON."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, **said: Any) -> None:
        """A line."""
        try:
            self._stream.write(json.dumps(said) + "\n")
            self._stream.flush()
        except BrokenPipeError as error:  # nobody waits for the plan any more
            raise KeyboardInterrupt from error

    def advanced(self, done: float, total: float) -> None:
        """A share of the build is done."""
        self.say(done=done / total)

    def metric(self, name: str, value: float, step: int) -> None:
        """Builders have none."""

    def note(self, text: str) -> None:
        """What a person should know."""
        self.say(note=text)


def main() -> int:
    """Build what standard input asks for; 0, also where an error was told."""
    # Libraries print to descriptor 1 at will.
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked, says = json.load(sys.stdin), _Says(stream)
    try:
        _answer(asked, says)
    except KeyboardInterrupt:
        return 130
    return 0


def _answer(asked: dict[str, Any], says: _Says) -> None:
    try:
        shapes = Shapes(**asked["shapes"])
        plan = build_plan(Path(asked["graph"]), asked["backend"], asked["architectures"], shapes, says)
        Path(asked["target"]).write_bytes(plan)
        says.say(peak_bytes=peak_rss_bytes())
    except StageError as error:
        parts = {name: None if part is None else str(part) for name, part in vars(error).items()}
        says.say(kind=type(error).__name__, **{name: parts[name] for name in ("what", "measured", "limit", "remedy")})


if __name__ == "__main__":
    end_process(main())
