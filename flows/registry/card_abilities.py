"""What a model card says of items: right answers beside dense with intervals, and where they were lost."""

from __future__ import annotations

from collections.abc import Iterator

from flows.reporting.abilities import Cell, ItemSet
from flows.reporting.format import markdown_table, number


def sections(found: ItemSet) -> Iterator[str]:
    """One on each ability beside dense, one on each step from dense on; no text where nothing was asked."""
    if found.abilities:
        rows = [
            (one.name, str(one.items), str(one.dense), *(_kept(one.cells.get(name)) for name in found.judged))
            for one in found.abilities
        ]
        yield f"## Right answers to {found.corpus}, and their share of {found.baseline}'s with its 95% interval"
        yield markdown_table(("ability", "items", found.baseline, *found.judged), rows)
    if found.heat:
        names = dict.fromkeys(name for cells in found.heat.values() for name in cells)
        changes = [(name, *(_change(cells.get(name)) for cells in found.heat.values())) for name in names]
        yield f"## Right answers to {found.corpus} more or fewer than {found.baseline}'s, after each step"
        yield markdown_table(("ability", *found.heat), changes)


def _kept(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    ratio = cell.ratio
    return f"{cell.right}" + (f" ({number(ratio.point)}; {number(ratio.low)}..{number(ratio.high)})" if ratio else "")


def _change(cell: tuple[int, int] | None) -> str:
    return f"{cell[0]:+d} of {cell[1]}" if cell else "-"
