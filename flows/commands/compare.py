"""The command compare."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import JsonOption, StoreOption, cells, looked_at, say_json, show, table

if TYPE_CHECKING:
    from flows.reporting.compare import Pair, Run
    from stages.runtime.artifacts import Store


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="An artifact (step or fingerprint) or a run.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same.")],
    store: StoreOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Show equal rows, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how two artifacts or two runs differ.

    Measures; of runs also the recipe's values, the state and the gates. --json has every row.
    """
    from flows.reporting.compare import compared

    artifacts = looked_at(store)
    found = compared(artifacts, (a, b), (_run_named(artifacts, a), _run_named(artifacts, b)))
    if as_json:
        say_json(found)
        return
    equal = 0
    for title, rows in (("recipe", found.params), ("gates", found.gates), ("measures", found.measures)):
        shown = {name: pair for name, pair in rows.items() if everything or pair.a != pair.b}
        equal += len(rows) - len(shown)
        if shown:
            _show(title, a, b, shown)
    if equal:
        typer.echo(f"{equal} equal {'row is' if equal == 1 else 'rows are'} not shown: --all")
    if found.difference:
        typer.echo(f"first difference of the work: {found.difference}")


def _show(title: str, a: str, b: str, rows: dict[str, Pair]) -> None:
    ratios = title == "measures"
    # The same name twice would be one column.
    shown = table(f"{a} and {b}: {title}", title, a, f"{b} ", *(["ratio"] if ratios else []))
    for column in shown.columns[1:] if ratios else ():
        column.justify, column.no_wrap = "right", True
    for name, pair in rows.items():
        shown.add_row(*cells(name, _said(pair.a), _said(pair.b), *([_ratio(pair)] if ratios else [])))
    show(shown)


def _said(value: Any) -> str:
    from flows.reporting.format import number

    if value is None or isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ratio(pair: Pair) -> str:
    return f"{pair.b / pair.a:.3f}" if pair.a and pair.b is not None else "-"


def _run_named(store: Store, name: str) -> Run | None:
    from flows.reporting.compare import Run
    from flows.running.run_records import find_run
    from stages.runtime.contract import StageError

    try:
        record = find_run(store.scratch, name)
    except StageError:
        return None
    return Run(record.line().state, record.recipe(), record.result)
