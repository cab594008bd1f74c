"""What a person sees while a recipe runs: a bar with time left for each running step, or plain lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from flows.reporting.format import duration
from flows.reporting.lasting_stream import LastingStream

EVERY_SHARE, EVERY_SECONDS = 0.1, 15.0
"""How often a plain line is worth writing."""
SETTLED = 0.05
"""Share of the work from which the time left is worth saying early: what begins slowly would promise hours."""


class _View(Protocol):
    """One way to show running steps."""

    def started(self, step: str) -> None: ...
    def advanced(self, step: str, done: float, total: float) -> None: ...
    def finished(self, step: str, text: str) -> None: ...
    def line(self, text: str) -> None: ...


class TerminalProgress:
    """Shows the steps of a run on standard error; safe from several threads.

    Used as a context manager; on a terminal the bars live only inside it.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic, live: bool | None = None
    ) -> None:
        stream = cast("TextIO", LastingStream(stream or sys.stderr))
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal if live is None else live
        self._bars = Bars(self.console) if self.live else None
        self._view: _View = self._bars or Lines(stream, clock)
        self._guard = threading.RLock()

    def __enter__(self) -> TerminalProgress:
        if self._bars:
            self._bars.shown.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.shown.stop()

    def for_step(self, name: str) -> StepListener:
        """The listener of one step's progress."""
        return StepListener(self, name)

    def started(self, step: str) -> None:
        """A step begins to compute."""
        with self._guard:
            self._view.started(step)

    def advanced(self, step: str, done: float, total: float) -> None:
        """A step has done `done` of `total`."""
        with self._guard:
            self._view.advanced(step, done, total)

    def finished(self, step: str, seconds: float, cached: bool, why: str = "") -> None:
        """A step has its artifact; `why` says why it was made anew."""
        text = "cached" if cached else f"done in {duration(seconds)}" + (f" ({why})" if why else "")
        with self._guard:
            self._view.finished(step, text)

    def failed(self, step: str, text: str) -> None:
        """A step broke."""
        with self._guard:
            self._view.finished(step, f"failed: {text}")

    def line(self, text: str) -> None:
        """A sentence between the bars."""
        with self._guard:
            self._view.line(text)


@dataclass(frozen=True)
class StepListener:
    """Hears one step and tells the terminal. Curves are MLflow's to draw."""

    terminal: TerminalProgress
    step: str

    def advanced(self, done: float, total: float) -> None:
        """See stages.runtime.contract.Progress."""
        self.terminal.advanced(self.step, done, total)

    def metric(self, name: str, value: float, step: int) -> None:
        """See stages.runtime.contract.Progress."""

    def note(self, text: str) -> None:
        """See stages.runtime.contract.Progress."""
        self.terminal.line(f"{self.step}: {text}")


class Bars:
    """One bar a running step, with time left; a finished step leaves a line."""

    def __init__(self, console: Console) -> None:
        self.shown = Progress(
            TextColumn("{task.description:<16}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def started(self, step: str) -> None:
        """Show an empty bar."""
        if step not in self._tasks:
            self._tasks[step] = self.shown.add_task(step, total=None)

    def advanced(self, step: str, done: float, total: float) -> None:
        """Move the bar."""
        self.started(step)
        self.shown.update(self._tasks[step], completed=done, total=total)

    def finished(self, step: str, text: str) -> None:
        """Replace the bar by a line."""
        task = self._tasks.pop(step, None)
        if task is not None:
            self.shown.remove_task(task)
        self.line(f"{step}: {text}")

    def line(self, text: str) -> None:
        """Write above the bars."""
        self.shown.console.print(Text(text))


class Lines:
    """Plain lines for logs and pipes: one at a start, about ten on the way, one at the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream, self._clock = stream, clock
        self._began: dict[str, float] = {}
        self._said: dict[str, tuple[int, float]] = {}

    def started(self, step: str) -> None:
        """Say so, once."""
        if step not in self._began:
            self._began[step] = self._clock()
            self._said[step] = (0, self._began[step])
            self.line(f"{step}: started")

    def advanced(self, step: str, done: float, total: float) -> None:
        """Say how far it is, if that is news."""
        self.started(step)
        now, share = self._clock(), min(1.0, done / total) if total > 0 else 0.0
        tenth = int(share / EVERY_SHARE + 1e-9)
        tenth_said, said = self._said[step]
        if tenth < tenth_said:
            # A second part of the step begins, such as the work after a download: its time left is its own.
            self._began[step], self._said[step] = now, (tenth, said)
        if tenth <= tenth_said and now - said < EVERY_SECONDS:
            return
        self._said[step] = (tenth, now)
        took = now - self._began[step]
        told = share >= SETTLED or took >= EVERY_SECONDS
        left = f", {duration(took * (1 - share) / share)} left" if told and 0 < share < 1 else ""
        self.line(f"{step}: {share:.0%}{left}")

    def finished(self, step: str, text: str) -> None:
        """Say how it ended."""
        self._began.pop(step, None)
        self.line(f"{step}: {text}")

    def line(self, text: str) -> None:
        """One line, at once."""
        self._stream.write(text + "\n")
        self._stream.flush()
