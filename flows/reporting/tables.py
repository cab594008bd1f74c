"""What a person reads when a run has ended: steps, gates, where things lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.reporting.format import duration, held_words, number, size
from flows.reporting.narrow import fitting
from flows.reporting.timed_steps import timed, told
from flows.results import GateResult, RunResult, RunVerdict, StepResult
from stages.measures.table import SPEEDS, foremost, title


def show_result(result: RunResult, console: Console) -> None:
    """The end of a run: steps, gates, what was executed and what only compiled, where the outputs lie."""
    for table in _tables(result):
        console.print(fitting(table, console))
    if result.executed:
        held = "measured" if result.unjudged else "judged"
        console.print(Text(f"executed and {held}: {', '.join(result.executed)}"))
    if result.compiled:
        console.print(Text(f"compiled, not judged: {', '.join(result.compiled)}"))
    if result.model:
        model = result.model
        serves = f", serves {', '.join(model.targets)}" if model.targets else ""
        held = ", promoted without a gate" if result.unjudged else ""
        stands = f"; {model.undone}" if model.undone else f" as {model.alias}{serves}{held}"
        console.print(Text(f"registered: {model.name} version {model.version}{stands}"))
    for what, where in {"report.html": result.report, **result.outputs, "store": result.store}.items():
        if where:
            console.print(Text(f"{what.partition('.')[0]}: {where}"))
    for gate in result.gates:
        if not gate.passed:
            console.print(Text(f"gate failed: {gate.said}", style="bold red"))
    for sentence in result.lost:
        console.print(Text(sentence))
    said = f"{result.verdict} ({result.unjudged}), done" if result.unjudged else result.verdict
    console.print(Text(f"run {result.run}: {said} in {duration(result.seconds)}", style=_STYLES[result.verdict]))


def _tables(result: RunResult) -> Iterator[Table]:
    yield steps_table(result)
    for device, measured in timed(result.steps).items():
        yield speed_table(device, measured)
    if result.gates:
        yield gates_table(result.gates)


_STYLES: Mapping[RunVerdict, str] = {"passed": "bold green", "gate failed": "bold red", "not judged": "bold yellow"}


def steps_table(result: RunResult) -> Table:
    """Step, stage, seconds, cached, size, foremost measure, note; a measurement stands with the step it measured."""
    table = Table(title=f"Steps of run {result.run}", title_justify="left")
    for column in ("step", "stage"):
        table.add_column(column, overflow="fold")
    shown = foremost(*(step.metrics for step in result.steps))
    for column in ("seconds", "cached", "size", title(shown)):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    measured: dict[str, float] = {}
    for step in result.steps:
        if step.measures and shown in step.metrics:
            measured.setdefault(step.measures, step.metrics[shown])  # on the first corpus
    for step in result.steps:
        table.add_row(*_step_row(step, shown, measured))
    return table


def _step_row(step: StepResult, shown: str, measured: dict[str, float]) -> list[Text]:
    own = step.metrics.get(shown)
    held = step.metrics.get("size_bytes")
    cells = [
        step.name,
        step.stage,
        f"{step.seconds:.1f}",
        "yes" if step.cached else "no",
        size(held) if held is not None else "-",
        number(own if own is not None else measured.get(step.name)),
        step.why,
    ]
    return [Text(cell) for cell in cells]


def speed_table(device: str, measured: Sequence[StepResult]) -> Table:
    """How fast artifacts are on one device, with the ratio of each figure to the baseline's."""
    table = Table(title=f"Speed on {device} (in brackets over the baseline's)", title_justify="left")
    table.add_column("measure", overflow="fold")
    for step in measured:
        table.add_column(step.measures, justify="right", overflow="fold")
    for name in (name for name in SPEEDS if any(name in step.metrics for step in measured)):
        table.add_row(*(Text(cell) for cell in [SPEEDS[name].title, *(told(step, name) for step in measured)]))
    return table


def gates_table(gates: list[GateResult]) -> Table:
    """One row a gate, artifact and corpus."""
    table = Table(title="Gates", title_justify="left")
    for column in ("measure", "artifact", "target", "corpus"):
        table.add_column(column, overflow="fold")
    for column in ("measured", "interval", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for gate in gates:
        interval = "-" if gate.low is None or gate.low == gate.high else f"{number(gate.low)}..{number(gate.high)}"
        measure = gate.measure + (f" / {gate.against}" if gate.against else "")
        corpus = (gate.corpus or "-") + (f": {gate.slice}{' (worst)' if gate.worst else ''}" if gate.slice else "")
        names = [measure, gate.artifact, gate.target or "-", corpus]
        limit = f"{held_words(gate.bound, gate.held)}{'<=' if gate.bound == 'at_most' else '>='} {number(gate.limit)}"
        cells = [*names, number(gate.measured), interval, limit, gate.state if gate.passed else "FAILED"]
        table.add_row(*(Text(cell) for cell in cells))
    return table
