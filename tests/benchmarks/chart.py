"""The bench's picture: loss against stored size and against seconds, one page without a script."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import escape

from flows.reporting.charts import Scale, log_ticks
from flows.reporting.format import short_number
from tests.benchmarks.results import Row, summary

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 70, 730, 30, 430
FLOOR_PERCENT = 0.01
"""Losses below it, and gains, stand on the lower edge: the axis is logarithmic."""
STYLE = """<meta charset="utf-8"><title>Bench</title><style>
:root{color-scheme:light dark} body{font:14px system-ui,sans-serif;max-width:900px;margin:2em auto}
svg text{fill:currentColor;font-size:12px} .end{text-anchor:end} .middle{text-anchor:middle}
.grid{stroke:currentColor;opacity:.15} circle{fill:#2a78d6} circle.peer{fill:#d97706}
</style>"""


def page(rows: Sequence[Row], dense: Row, peers: Sequence[str]) -> str:
    """Two scatters; what lies lower and further left is better. `peers` are drawn in another colour."""
    body = [f"<h1>Loss of each technique</h1><p>{escape(dense.about)}. Other tools in orange.</p>"]
    for name, label in (("size_mb", "stored MB"), ("seconds", "seconds")):
        points = []
        for row in rows:
            found = summary(row, dense)
            if found.get(name, 0) > 0 and "loss_percent" in found:
                points.append((row.name, found[name], max(FLOOR_PERCENT, found["loss_percent"])))
        if points:
            body += [f"<h2>Loss in-domain against {label}</h2>", _scatter(points, peers, f"{label}, log scale")]
    return "<!doctype html>" + STYLE + "".join(body)


def _scatter(points: Sequence[tuple[str, float, float]], peers: Sequence[str], label: str) -> str:
    across = _scale([x for _, x, _ in points], LEFT, RIGHT)
    up = _scale([y for _, _, y in points], BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss against {escape(label)}">']
    for tick in log_ticks(across.low, across.high):
        parts.append(f'<line class="grid" x1="{across(tick)}" x2="{across(tick)}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(f'<text class="middle" x="{across(tick)}" y="{BOTTOM + 18}">{short_number(tick)}</text>')
    for tick in log_ticks(up.low, up.high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{up(tick)}" y2="{up(tick)}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{up(tick) + 4}">{short_number(tick)}</text>')
    parts.append(f'<text class="middle" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}">{escape(label)}</text>')
    parts.append(f'<text x="4" y="{TOP - 12}">loss, % of the dense perplexity, log scale</text>')
    for name, x, y in points:
        kind = ' class="peer"' if name in peers else ""
        said = f"{escape(name)}: {short_number(y)}% at {short_number(x)}"
        parts.append(f'<circle{kind} cx="{across(x)}" cy="{up(y)}" r="4.5"><title>{said}</title></circle>')
        parts.append(f'<text x="{across(x) + 8}" y="{up(y) + 4}">{escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    return Scale(min(values) / 1.2, max(values) * 1.2, start, end, log=True)
