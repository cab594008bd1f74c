"""Rows of the bench: kept one JSON line each, shown as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.reporting.format import size

COLUMNS = (
    "technique",
    "loss %",
    "x elsewhere",
    "KL",
    "KL short",
    "bits or kept",
    "size",
    "seconds",
    "peak GB",
    "notes",
)


@dataclass(frozen=True)
class Row:
    """What one technique came to.

    Attributes:
        name: the technique.
        key: identity of what was measured: code, params, inputs, windows.
        figures: seconds, import_seconds, peak_rss_bytes, size_bytes, perplexity_text, perplexity_other, kl,
            kl_short; of the row of a busy neighbour its own.
        metrics: what the stage itself told.
        about: what a reader must know.
        error: why there are no figures.
    """

    name: str
    key: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    about: str = ""
    error: str = ""


def keep(path: Path, row: Row) -> None:
    """Append a row."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(row)) + "\n")


def kept(path: Path) -> dict[str, Row]:
    """Name -> the last row of it; a line that a kill cut short is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = Row(**json.loads(line))
        except json.JSONDecodeError:
            continue
        found[row.name] = row
    return found


def summary(row: Row, dense: Row) -> dict[str, float]:
    """The row's figures beside the dense model's: loss in percent, ratio elsewhere, what is left, megabytes."""
    figures = dict(row.figures)
    plain = ("kl", "kl_short", "seconds", "import_seconds")
    found: dict[str, float] = {n: v for n, v in figures.items() if n in plain or "beside" in n or "spinning" in n}
    if "perplexity_text" in figures:
        ratios = [figures[f"perplexity_{name}"] / dense.figures[f"perplexity_{name}"] for name in ("text", "other")]
        found |= {"loss_percent": 100 * (ratios[0] - 1), "ratio_elsewhere": ratios[1]}
    for name, unit in (("peak_rss_bytes", 1e9), ("size_bytes", 1e6)):
        if name in figures:
            found[{"peak_rss_bytes": "peak_rss_gb", "size_bytes": "size_mb"}[name]] = figures[name] / unit
    told = row.metrics
    if "block_parameters_before" in told:
        found["kept_share"] = told["block_parameters"] / told["block_parameters_before"]
    elif "sparsity" in told:
        found["kept_share"] = 1 - told["sparsity"]
    if "bits_per_weight" in told:
        found["bits_per_weight"] = told["bits_per_weight"]
    return found


def beside(rows: Sequence[Row], tuned: str, names: Sequence[str]) -> list[Row]:
    """The rows, those of `names` told beside the fine-tuned model: training on a text learns the text."""
    found = {row.name: row.figures.get("perplexity_text") for row in rows}
    made = []
    for row in rows:
        mine, theirs = found[row.name], found.get(tuned)
        if row.name in names and mine and theirs:
            row = replace(row, about=f"{row.about}; x{mine / theirs:.3f} of {tuned} in-domain")
        made.append(row)
    return made


def cells(row: Row, dense: Row) -> tuple[str, ...]:
    """The row as the table's cells, a dash where there is no figure."""
    found = summary(row, dense)

    def shown(name: str, form: str) -> str:
        return format(found[name], form) if name in found and math.isfinite(found[name]) else "-"

    left = f"{found['bits_per_weight']:.2f} bits" if "bits_per_weight" in found else shown("kept_share", ".1%")
    stored = size(row.figures["size_bytes"]) if "size_bytes" in row.figures else "-"
    told = (
        shown("loss_percent", "+.2f"),
        shown("ratio_elsewhere", ".4f"),
        shown("kl", ".4f"),
        shown("kl_short", ".4f"),
        left,
        stored,
    )
    return (row.name, *told, shown("seconds", ".1f"), shown("peak_rss_gb", ".2f"), row.error or row.about)


def table(rows: Sequence[Row], dense: Row, title: str) -> Table:
    """All rows, for a terminal."""
    made = Table(title=title, title_justify="left")
    for name in COLUMNS:
        left = name in ("technique", "notes")
        made.add_column(name, justify="left" if left else "right", no_wrap=name != "notes")
    for row in rows:
        made.add_row(*map(Text, cells(row, dense)), style="red" if row.error else "")
    return made


def columns(rows: Sequence[Row], dense: Row) -> dict[str, list[Any]]:
    """The same as columns of numbers, for MLflow; None where there is no figure."""
    names = ("loss_percent", "ratio_elsewhere", "kl", "kl_short", "bits_per_weight", "kept_share", "size_mb", "seconds")
    found = [summary(row, dense) for row in rows]
    made: dict[str, list[Any]] = {"technique": [row.name for row in rows]}
    made |= {name: [one.get(name) for one in found] for name in (*names, "import_seconds", "peak_rss_gb")}
    return made | {"notes": [row.error or row.about for row in rows]}
