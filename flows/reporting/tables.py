"""What a person reads when a run has ended: steps, gates, where things lie."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.reporting.format import duration, number, size
from flows.results import GateResult, RunResult, StepResult


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
    measured: dict[str, float] = {}
    for step in result.steps:
        if step.measures and "perplexity" in step.metrics:
            measured.setdefault(step.measures, step.metrics["perplexity"])  # on the first corpus
    for step in result.steps:
        table.add_row(*_step_row(step, measured))
    return table


def _step_row(step: StepResult, measured: dict[str, float]) -> list[Text]:
    own = step.metrics.get("perplexity")
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
