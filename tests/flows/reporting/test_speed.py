"""Speed beside quality: one table and one chart a device, the baseline among them, and what nothing beats joined."""

import io
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flows.reporting.charts import pareto_chart
from flows.reporting.report import Drawn, write_report
from flows.reporting.speed import speed_tables
from flows.reporting.tables import show_result
from flows.results import StepResult
from stages.runtime.contract import Kind
from tests.flows.made_up import made_up
from tests.flows.reporting.test_report import Page

MEASURES = {
    "decode_tokens_per_s": 10.0, "prefill_tokens_per_s": 300.0, "time_to_first_token_ms": 1700.0,
    "token_latency_p50_ms": 100.0, "load_s": 3.0, "peak_rss_bytes": 9e8,
}  # fmt: skip


def speed(times, device="a processor x2", **said):
    """What `bench` seals of an artifact that is so many times as fast as its baseline."""
    ours = {name: value * times if name.endswith("_per_s") else value / times for name, value in MEASURES.items()}
    ratios = {
        name: [ours[name] / value, 0.9 * ours[name] / value, 1.2 * ours[name] / value]
        for name, value in MEASURES.items()
    }
    ratios |= {name: [ratios[name][0]] * 3 for name in ("load_s", "peak_rss_bytes")}
    both = {
        "artifact": {"measures": ours, "target": "onnxruntime:cpu", "threads": 2},
        "baseline": {"measures": MEASURES, "target": "torch:cpu", "threads": 2},
        "ratios": ratios,
    }
    cells = [{"batch": n, "prompt_tokens": 128, "new_tokens": 32, **both} for n in (1, 4)]
    first = {"batch": 1, "prompt_tokens": 512, "new_tokens": 32, **both}
    executor = {"target": "onnxruntime:cpu", "device": device, "runtime": "onnxruntime 1"}
    return {"task": "generate", "repeats": 5, "executor": executor, "speed": first, "cells": cells, **said}


def quality(value):
    return {"measures": {"perplexity": value, "size_bytes": 9.0}}


SPEEDS = {("cpu", "dense"): speed(4), ("slow", "dense"): speed(0.5), ("far", "dense"): speed(9, "another x8")}
QUALITY = {(name, "text"): quality(at) for name, at in {"dense": 20, "cpu": 21, "slow": 25, "far": 22}.items()}


def test_tables_hold_one_device_each_with_the_baseline_first():
    here, there = speed_tables(SPEEDS, QUALITY)
    assert (here.device, there.device) == ("a processor x2", "another x8")
    assert [one.name for one in here.lines] == ["dense", "cpu", "slow"]
    assert [one.name for one in there.lines] == ["dense", "far"]
    assert here.headings[0] == "tokens/s written" and len(here.headings) == len(MEASURES)
    assert [one.figures[0] for one in here.lines] == ["10", "40; 4 (3.6 to 4.8)", "5; 0.5 (0.45 to 0.6)"]
    assert here.lines[1].figures[-1] == "225 MB; 0.25"
    assert here.lines[1].target == "onnxruntime:cpu, 2 threads"
    assert here.asked == "one prompt of 512 tokens, 32 new ones behind; 5 rounds"
    assert [which for which, _ in here.batches] == [(1, 128)] * 3 + [(4, 128)] * 3
    assert "far" not in str(here.chart) and "far" in str(there.chart) and "cpu" not in str(there.chart)


def test_chart_joins_what_nothing_beats_and_names_every_point():
    here, _ = speed_tables(SPEEDS, QUALITY)
    chart = str(here.chart)
    points = {name: (x, y) for name, x, y in placed(chart)}
    assert set(points) == {"dense", "cpu", "slow"}
    assert points["slow"][0] < points["dense"][0] < points["cpu"][0], "faster is further right"
    assert points["dense"][1] < points["cpu"][1] < points["slow"][1], "less perplexity is higher up"
    joined = re.search('class="curve front" points="([^"]+)"', chart)[1]
    assert joined == " ".join(f"{x},{y}" for x, y in (points["dense"], points["cpu"]))


def test_chart_places_by_the_ratio_what_was_measured_in_a_busier_hour():
    busy = speed(4)
    for role in ("artifact", "baseline"):
        busy["speed"][role] = busy["speed"][role] | {"measures": {name: at / 2 for name, at in MEASURES.items()}}
    twice = {("cpu", "dense"): speed(4), ("again", "dense"): busy}
    (table,) = speed_tables(twice, QUALITY | {("again", "text"): quality(23)})
    points = {name: x for name, x, _ in placed(str(table.chart))}
    assert points["again"] == points["cpu"] > points["dense"]


def placed(chart):
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5"><title>([^:]+):', chart)
    return [(name, float(x), float(y)) for x, y, name in dots]


POINTS = st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=2, max_size=8, unique=True)


@settings(max_examples=40)
@given(POINTS, st.booleans())
def test_chart_front_is_what_no_other_point_is_at_least_as_good_as(points, less):
    named = [(f"p{n}", x, y) for n, (x, y) in enumerate(points)]
    chart = str(pareto_chart(named, "speed", "quality", less_is_better=less))
    front = set(re.findall(r'series0"[^>]*><title>(p\d+)', chart))
    for name, x, y in named:
        others = [(a, -b if less else b) for other, a, b in named if other != name]
        beaten = any(a >= x and b >= (-y if less else y) for a, b in others)
        assert (name in front) == (not beaten)


def test_chart_of_a_quality_that_compares_with_the_baseline_has_the_baseline_where_it_equals_itself():
    reports = {("cpu", "text"): {"measures": {"cosine": 0.98}}}
    tables = speed_tables({("cpu", "dense"): speed(4)}, reports)
    points = {name: y for name, _, y in placed(str(tables[0].chart))}
    assert points["dense"] < points["cpu"]
    assert speed_tables({("cpu", "dense"): speed(4)}, {})[0].chart == ""


def test_report_and_terminal_show_speed_with_its_device(tmp_path):
    result, manifests, reports, curves = made_up()
    told = {"fingerprint": "f" * 64, "uri": "u", "cached": False, "seconds": 60.0, "peak_rss_bytes": 0}
    metrics = {"decode_tokens_per_s": 40.0, "decode_tokens_per_s_ratio": 4.0, "peak_rss_bytes": 2.2e8}
    timed = StepResult(
        name="bench-cpu",
        stage="bench",
        kind=Kind.REPORT,
        metrics=metrics,
        measures="cpu",
        device="a <processor> x2",
        **told,
    )
    result = result.model_copy(update={"steps": [*result.steps, timed]})
    drawn = Drawn(curves, (), speed_tables({("cpu", "dense"): speed(4, "a <processor> x2")}, reports))
    path = tmp_path / "report.html"
    write_report(result, manifests, reports, "recipe: 1", (), path, drawn=drawn)
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Speed on a <processor> x2" in text and "40; 4 (3.6 to 4.8)" in text
    assert "Of one prompt of 512 tokens, 32 new ones behind; 5 rounds." in text
    console = Console(width=160, record=True, file=io.StringIO())
    show_result(result, console)
    said = console.export_text()
    assert "Speed on a <processor> x2" in said and re.search(r"tokens/s written *│ *40 \(4\) *│", said)
    assert re.search(r"peak memory *│ *220 MB *│", said)
