"""What a person sees while a recipe runs and when it ends: bars with time left, or plain lines; then the tables."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flows.results import GateResult, RunResult, StepResult

EVERY_SHARE, EVERY_SECONDS = 0.1, 15.0
"""How often a plain line is worth writing."""


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
        stream = stream or sys.stderr
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
        self._said: dict[str, tuple[float, float]] = {}

    def started(self, step: str) -> None:
        """Say so, once."""
        if step not in self._began:
            self._began[step] = self._clock()
            self._said[step] = (0.0, self._began[step])
            self.line(f"{step}: started")

    def advanced(self, step: str, done: float, total: float) -> None:
        """Say how far it is, if that is news."""
        self.started(step)
        now, share = self._clock(), min(1.0, done / total) if total > 0 else 0.0
        share_said, said = self._said[step]
        if share < share_said:
            share_said = 0.0
        elif share - share_said < EVERY_SHARE and now - said < EVERY_SECONDS:
            return
        self._said[step] = (share, now)
        took = now - self._began[step]
        left = f", {duration(took * (1 - share) / share)} left" if 0 < share < 1 else ""
        self.line(f"{step}: {share:.0%}{left}")

    def finished(self, step: str, text: str) -> None:
        """Say how it ended."""
        self._began.pop(step, None)
        self.line(f"{step}: {text}")

    def line(self, text: str) -> None:
        """One line, at once."""
        self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as a person says them, in powers of ten: 940 B, 2.1 kB, 89.6 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def number(value: float | None) -> str:
    """A measure in a table: whole numbers with separators, others in four digits, a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def show_result(result: RunResult, console: Console) -> None:
    """The end of a run: steps, gates, what was executed and what only compiled, where the outputs lie."""
    console.print(steps_table(result))
    if result.gates:
        console.print(gates_table(result.gates))
    if result.executed:
        console.print(Text(f"executed and judged: {', '.join(result.executed)}"))
    if result.compiled:
        console.print(Text(f"compiled, not judged: {', '.join(result.compiled)}"))
    if result.model:
        model = result.model
        serves = f", serves {', '.join(model.targets)}" if model.targets else ""
        console.print(Text(f"registered: {model.name} version {model.version} as {model.alias}{serves}"))
    for what, where in {"report": result.report, **result.outputs, "store": result.store}.items():
        if where:
            console.print(Text(f"{what}: {where}"))
    for gate in result.gates:
        if not gate.passed:
            console.print(Text(f"gate failed: {gate.said}", style="bold red"))
    verdict = ("passed", "bold green") if result.passed else ("not passed", "bold red")
    console.print(Text(f"run {result.run}: {verdict[0]} in {duration(result.seconds)}", style=verdict[1]))


def steps_table(result: RunResult) -> Table:
    """Step, stage, seconds, cached, size, perplexity, note; a measurement stands with the step it measured."""
    table = Table(title=f"Steps of run {result.run}", title_justify="left")
    for column in ("step", "stage"):
        table.add_column(column, overflow="fold")
    for column in ("seconds", "cached", "size", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    measured = {
        step.name: step.metrics["perplexity"]
        for step in result.steps
        if step.stage == "validate" and "perplexity" in step.metrics
    }
    for step in result.steps:
        table.add_row(*_step_row(step, measured))
    return table


def _step_row(step: StepResult, measured: dict[str, float]) -> list[Text]:
    own = step.metrics.get("perplexity")
    first = next((value for name, value in measured.items() if name.startswith(f"validate-{step.name}-")), None)
    held = step.metrics.get("size_bytes")
    cells = [
        step.name,
        step.stage,
        f"{step.seconds:.1f}",
        "yes" if step.cached else "no",
        size(held) if held is not None else "-",
        number(own if own is not None else first),
        step.why,
    ]
    return [Text(cell) for cell in cells]


def gates_table(gates: list[GateResult]) -> Table:
    """One row a gate, artifact and corpus."""
    table = Table(title="Gates", title_justify="left")
    for column in ("measure", "artifact", "target", "corpus"):
        table.add_column(column, overflow="fold")
    for column in ("measured", "interval", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("passed", no_wrap=True)
    for gate in gates:
        interval = "-" if gate.low is None or gate.low == gate.high else f"{number(gate.low)}..{number(gate.high)}"
        measure = gate.measure + (f" / {gate.against}" if gate.against else "")
        names = [measure, gate.artifact, gate.target or "-", gate.corpus or "-"]
        cells = [*names, number(gate.measured), interval, number(gate.limit), "yes" if gate.passed else "NO"]
        table.add_row(*(Text(cell) for cell in cells))
    return table
