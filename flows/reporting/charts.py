"""Charts as inline SVG whose colours come from the page's style, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from flows.reporting.format import short_number, short_size

WIDTH = 860
ROW = 28
LABEL = 150


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two bounds."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, first + 12) if low <= i * step <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """One, two and five times the powers of ten between two bounds, thinned to powers when that is enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    coarse = [10.0**d for d in decades if low <= 10.0**d <= high]
    return coarse if len(coarse) >= 3 else fine


def steps_chart(
    rows: Sequence[tuple[str, float | None, Mapping[str, float]]], corpora: Sequence[str], measure: str
) -> Markup:
    """One row a step: its size as a bar, its measure on each corpus as a dot."""
    height = ROW * len(rows) + 52
    body = [_text(LABEL, 14, "size", "start head"), _text(540, 14, measure, "start head")]
    body += _legend(corpora, max(640, 560 + 8 * len(measure)), 14)
    bars = Scale(0, max([one for _, one, _ in rows if one] or [1.0]), LABEL, 440)
    values = [v for _, _, scores in rows for v in scores.values() if math.isfinite(v)]
    dots = _padded(values, 540, WIDTH - 60) if values else None
    if dots:
        for tick in log_ticks(dots.low, dots.high) if dots.log else ticks(dots.low, dots.high):
            body.append(_line(dots(tick), 26, dots(tick), height - 22, "grid"))
            body.append(_text(dots(tick), height - 6, short_number(tick), "middle tick"))
    for i, (name, weight, scores) in enumerate(rows):
        y = 26 + ROW * i + ROW / 2
        body.append(_text(LABEL - 10, y + 4, name, "end name"))
        if weight:
            width = max(1.0, bars(weight) - LABEL)
            body.append(f'<rect class="bar" x="{LABEL}" y="{y - 7}" width="{width:.1f}" height="14" rx="2"/>')
            body.append(_text(LABEL + width + 6, y + 4, short_size(weight), "start value"))
        body += _dots(scores, corpora, dots, y)
    return _svg(WIDTH, height, body, f"Size and {measure} after each step")


def _dots(scores: Mapping[str, float], corpora: Sequence[str], scale: Scale | None, y: float) -> list[str]:
    placed = sorted((scale(v), corpus, v) for corpus, v in scores.items() if scale and math.isfinite(v))
    marks: list[str] = []
    waiting: list[str] = []
    for i, (x, corpus, value) in enumerate(placed):
        kind = f"series{corpora.index(corpus) % 4}"
        marks.append(f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="5">{_title(corpus, value)}</circle>')
        waiting.append(short_number(value))
        if i + 1 == len(placed) or placed[i + 1][0] - x > 50:  # figures of dots that nearly touch stand together
            marks.append(_text(x + 9, y + 4, " / ".join(waiting), "start value"))
            waiting = []
    return marks


def interval_chart(measured: float, low: float, high: float, limit: float, *, upper: bool) -> Markup:
    """A measured interval against its limit; the side that may not be reached is shaded."""
    scale = _padded([measured, low, high, limit], 6, 214, log=False)
    edge = scale(limit)
    x, width = (edge, 220 - edge) if upper else (0.0, edge)
    body = [
        f'<rect class="beyond" x="{x}" y="2" width="{width:.1f}" height="20"/>',
        _line(edge, 0, edge, 24, "limit"),
        _line(scale(low), 12, scale(high), 12, "interval"),
        f'<circle class="dot series0" cx="{scale(measured)}" cy="12" r="4.5"/>',
    ]
    at, bottom, top, edged = (short_number(value) for value in (measured, low, high, limit))
    said = f"measured {at}, interval {bottom} to {top}, limit {edged}"
    return _svg(220, 24, body, said)


def curve_chart(name: str, points: Sequence[tuple[float, float]]) -> Markup:
    """A curve that a stage told while it ran."""
    width, height = 420, 210
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return Markup("")
    across = Scale(min(x for x, _ in points), max(x for x, _ in points), 56, width - 14)
    up = _padded([y for _, y in points], height - 30, 26)
    body = [_text(8, 14, name, "start head")]
    for tick in log_ticks(up.low, up.high) if up.log else ticks(up.low, up.high):
        body.append(_line(56, up(tick), width - 14, up(tick), "grid"))
        body.append(_text(50, up(tick) + 4, short_number(tick), "end tick"))
    for tick in ticks(across.low, across.high):
        body.append(_text(across(tick), height - 10, short_number(tick), "middle tick"))
    path = " ".join(f"{across(x)},{up(y)}" for x, y in points)
    body.append(f'<polyline class="curve" points="{path}"/>')
    if len(points) == 1:
        body.append(f'<circle class="dot series0" cx="{across(points[0][0])}" cy="{up(points[0][1])}" r="4"/>')
    said = f"{name}: {short_number(points[0][1])} at first, {short_number(points[-1][1])} at last"
    return _svg(width, height, body, said)


def pareto_chart(points: Sequence[tuple[str, float, float]], across: str, up: str, *, less_is_better: bool) -> Markup:
    """Quality against speed, both better towards the upper right; a line joins what nothing beats in both.

    Args:
        points: name, speed and quality.
        across: heading of the speeds, of which more is better.
        up: heading of the qualities.
        less_is_better: whether less of the quality is better: its axis points down then.
    """
    width, height = 560, 300
    points = [one for one in points if math.isfinite(one[1]) and math.isfinite(one[2])]
    if len(points) < 2:
        return Markup("")
    xs = _padded([x for _, x, _ in points], 70, width - 90)
    low, high = (26, height - 46) if less_is_better else (height - 46, 26)
    ys = _padded([y for _, _, y in points], low, high)
    body = [_text(8, 14, up, "start head"), _text(width - 14, height - 6, across, "end head")]
    for tick in log_ticks(ys.low, ys.high) if ys.log else ticks(ys.low, ys.high):
        body.append(_line(70, ys(tick), width - 14, ys(tick), "grid"))
        body.append(_text(64, ys(tick) + 4, short_number(tick), "end tick"))
    for tick in log_ticks(xs.low, xs.high) if xs.log else ticks(xs.low, xs.high):
        body.append(_text(xs(tick), height - 26, short_number(tick), "middle tick"))
    front = _front(points, less_is_better=less_is_better)
    joined = " ".join(f"{xs(x)},{ys(y)}" for _, x, y in front)
    body.append(f'<polyline class="curve front" points="{joined}"/>')
    best = {name for name, _, _ in front}
    for name, x, y in points:
        kind = "series0" if name in best else "series1"
        said = f"<title>{escape(name)}: {short_number(x)}, {short_number(y)}</title>"
        body.append(f'<circle class="dot {kind}" cx="{xs(x)}" cy="{ys(y)}" r="5">{said}</circle>')
        body.append(_text(xs(x) + 7, ys(y) - 7, name, "start name"))  # above the line
    return _svg(width, height, body, f"{up} against {across}; best in neither way: {_rest(points, best)}")


def _front(points: Sequence[tuple[str, float, float]], *, less_is_better: bool) -> list[tuple[str, float, float]]:
    """The points that no other one beats in both, from the slowest."""
    sign = -1 if less_is_better else 1

    def beaten(one: tuple[str, float, float]) -> bool:
        return any(x >= one[1] and sign * y >= sign * one[2] and (x, y) != one[1:] for _, x, y in points)

    return sorted((one for one in points if not beaten(one)), key=lambda one: one[1])


def _rest(points: Sequence[tuple[str, float, float]], best: set[str]) -> str:
    return ", ".join(name for name, _, _ in points if name not in best) or "none"


def _padded(values: Sequence[float], start: float, end: float, *, log: bool | None = None) -> Scale:
    low, high = min(values), max(values)
    if log is None:
        log = low > 0 and high / low > 20
    if log:
        return Scale(low / 1.15, high * 1.15, start, end, log=True)
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return Scale(low - pad, high + pad, start, end)


def _legend(corpora: Sequence[str], x: float, y: float) -> list[str]:
    body: list[str] = []
    for i, corpus in enumerate(corpora):
        body.append(f'<circle class="dot series{i % 4}" cx="{x}" cy="{y - 4}" r="5"/>')
        body.append(_text(x + 10, y, corpus, "start tick"))
        x += 28 + 7.2 * len(corpus)
    return body


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def _title(corpus: str, value: float) -> str:
    return f"<title>{escape(corpus)}: {short_number(value)}</title>"


def _svg(width: float, height: float, body: Sequence[str], said: str) -> Markup:
    # Every text in `body` was escaped by `_text` or `_title`; the rest are numbers and class names of this module.
    return Markup(  # noqa: S704
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{escape(said)}">'
        + "".join(body)
        + "</svg>"
    )
