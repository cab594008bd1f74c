"""Figures as people say them: seconds, bytes, measures. The short forms are for charts, where room is scarce."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flows.results import Bound, Held


def duration(seconds: float, *, tenths_below_s: float = 10) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < tenths_below_s:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as a person says them, in powers of ten: 940 B, 2.1 kB, 89.6 MB, 5.60 GB."""
    scaled, unit = _scaled(count)
    return f"{scaled:.{ {'B': 0, 'GB': 2}.get(unit, 1) }f} {unit}"


def short_size(count: float) -> str:
    """Bytes in three digits: 940 B, 2.1 kB, 146 MB, 5.6 GB."""
    scaled, unit = _scaled(count)
    return f"{scaled:.{0 if unit == 'B' or scaled >= 100 else 1}f} {unit}"


def number(value: float | None) -> str:
    """A measure in a table: whole numbers with separators, others in four digits, a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def short_number(value: float) -> str:
    """A figure with four digits that matter; in powers of ten where it is very large or very small."""
    return f"{value:.3g}" if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3) else number(value)


def _scaled(count: float) -> tuple[float, str]:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return count, unit
        count /= 1000
    return count, "GB"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def held_words(bound: Bound, held: Held) -> str:
    """What stands before a gate's limit that is not on the interval's bad end."""
    end = "low end " if bound == "at_most" else "high end "
    return {"bad end": "", "value": "value ", "good end": end}[held]
