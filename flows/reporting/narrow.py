"""A table where a terminal is too narrow for it: its rows one below the other, a line for each column."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

BROKEN = 8
"""Characters of a word in a cell that stay together; a heading is never broken."""
_BETWEEN, _EDGE = 3, 1
"""Columns of a terminal that a table's own lines take behind each column, and once."""


def fitting(table: Table, console: Console) -> RenderableType:
    """The table, or its rows as records where the console would break its headings; empty cells are left out then."""
    needs = sum(_least(column, console) + _BETWEEN for column in table.columns) + _EDGE
    return table if needs <= console.width or not table.rows else _records(table)


def _least(column: Column, console: Console) -> int:
    heading, *cells = (Measurement.get(console, console.options, one) for one in (column.header, *column.cells))
    if column.no_wrap:
        return max(one.maximum for one in (heading, *cells))
    return max([heading.minimum, *(min(one.minimum, BROKEN) for one in cells)])


def _records(table: Table) -> Table:
    shown = Table.grid("name", "value", padding=(0, 2, 0, 0))
    shown.title, shown.title_justify = table.title, "left"
    for column in shown.columns:
        column.overflow = "fold"
    names = [column.header for column in table.columns]
    for row, cells in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        if row:
            shown.add_row()
        for name, cell in _said(names, cells):
            shown.add_row(name, cell)
    return shown


def _said(
    names: list[RenderableType], cells: tuple[RenderableType, ...]
) -> Iterator[tuple[RenderableType, RenderableType]]:
    for name, cell in zip(names, cells, strict=True):
        if str(cell):
            yield Text(str(name), style="bold"), cell
