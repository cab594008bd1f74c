"""The report is one file that says what was measured, asks for nothing and runs nothing."""

import html
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from flows.reporting.charts import Scale, curve_chart, interval_chart, log_ticks, steps_chart, ticks
from flows.reporting.format import short_number
from flows.reporting.report import Drawn, curves_of, reproduce, write_report
from stages.runtime.contract import FileEntry
from tests.flows.made_up import STEPS, made_up
from tests.flows.recorded import sealed

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Balanced tags, texts, attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def written(tmp_path, recipe="recipe: 1\n", command=("/x/enginery", "run", "a b"), **how):
    result, manifests, reports, curves = made_up(**how)
    path = tmp_path / "runs" / "report.html"
    write_report(result, manifests, reports, recipe, command, path, drawn=Drawn(curves))
    return path.read_text(encoding="utf-8")


def test_report_of_a_passed_run_says_verdict_gates_steps_and_provenance(tmp_path):
    source = written(tmp_path)
    page = Page(source)
    verdict, rest = page.text.split("Gates", 1)
    assert "Passed. All 4 gates hold" in verdict and "smollm2-135m version 3" in verdict
    assert "Executed and judged: cpu on onnxruntime:cpu" in verdict
    assert "Compiled, not judged: gpu for tensorrt_rtx:sm_89+sm_120" in verdict
    for said in ("1.096", "1.081 to 1.113", "≤ 1.25", "≥ 0.8", "≤ 200 MB", "exact", "6 min 42 s", "134,515,008"):
        assert said in rest
    for name, *_, scores in STEPS:
        assert name in rest and all(short_number(value) in rest for value in scores.values())
    assert "enginery run 'a b'" in page.text and "torch 2.13.0" in page.text and "719c1af" in page.text
    result = made_up()[0]
    assert all(step.fingerprint in page.text for step in result.steps)
    assert len(source.encode()) < 500_000


def test_report_of_a_failed_run_names_the_gate_first(tmp_path):
    text = Page(written(tmp_path, passed=False, cached=True)).text
    assert "Failed. 1 of 4 gates did not hold" in text
    assert text.index("measured 1.096, limit 1.1") < text.index("Nothing was registered")
    assert "22 of 22 steps were sealed before" in text and "cached" in text


def test_report_of_a_run_without_gates_claims_no_verdict(tmp_path):
    result, manifests, _, _ = made_up()
    bare = result.model_copy(
        update={"gates": [], "verdict": "not judged", "model": None, "steps": result.steps[:1], "compiled": []}
    )
    path = tmp_path / "report.html"
    write_report(bare, {"dense": manifests["dense"]}, {}, "recipe: 1", (), path)
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Not judged: the recipe has no gates" in text and "Passed" not in text and "Curves" not in text
    assert "Executed and measured: cpu on onnxruntime:cpu" in text
    write_report(bare.model_copy(update={"model": result.model}), {}, {}, "recipe: 1", (), path)
    assert "executed on onnxruntime:cpu, promoted without a gate" in Page(path.read_text(encoding="utf-8")).text


def test_report_shades_the_side_that_the_bound_names_whatever_the_sentence_says(tmp_path):
    result, manifests, _, _ = made_up()
    path = tmp_path / "report.html"
    for bound, sign in (("at_most", "≤"), ("at_least", "≥")):
        gate = result.gates[0].model_copy(update={"bound": bound, "text": "at least as good; limit at least 9"})
        write_report(result.model_copy(update={"gates": [gate]}), manifests, {}, "", (), path)
        page = path.read_text(encoding="utf-8")
        assert f"{sign} 1.25" in Page(page).text
        (x,) = re.findall(r'class="beyond" x="([\d.]+)"', page)
        assert (float(x) > 0) == (bound == "at_most")


def test_report_says_of_a_gate_without_a_champion_that_it_was_not_applied(tmp_path):
    result, manifests, _, _ = made_up()
    none = {"against": "champion", "measured": None, "low": None, "high": None}
    gates = [result.gates[0].model_copy(update=none), result.gates[1]]
    path = tmp_path / "report.html"
    write_report(result.model_copy(update={"gates": gates}), manifests, {}, "", (), path)
    text = Page(path.read_text(encoding="utf-8")).text
    assert "The gate holds, others have no champion to compare with yet." in text
    assert text.count("not applicable") == 1 and text.count("✓ passed") == 1


def test_report_asks_for_nothing_and_holds_no_script(tmp_path):
    page = Page(written(tmp_path))
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "data", "action", "poster"} and "script" not in page.tags
    assert not [name for name in names if name.startswith("on")]
    policy = dict(page.attributes)["content"]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes, policy
    assert "url(" not in written(tmp_path) and "@import" not in written(tmp_path)


def test_report_of_hostile_texts_shows_them_as_text(tmp_path):
    result, manifests, reports, _ = made_up()
    step = result.steps[0].model_copy(update={"name": EVIL, "why": EVIL, "stage": EVIL})
    gate = result.gates[0].model_copy(update={"text": EVIL, "passed": False, "corpus": EVIL, "artifact": EVIL})
    work = manifests["dense"].work.model_copy(update={"params": {EVIL: EVIL}, "inputs": {EVIL: EVIL}})
    made = manifests["dense"].provenance.model_copy(update={"host": EVIL, "commit": EVIL})
    evil = manifests["dense"].model_copy(update={"work": work, "provenance": made})
    hostile = result.model_copy(
        update={
            "steps": [step],
            "gates": [gate],
            "outputs": {EVIL: EVIL},
            "run": EVIL,
            "executed": [EVIL],
            "store": EVIL,
            "model": result.model.model_copy(update={"name": EVIL}),
        }
    )
    path = tmp_path / "report.html"
    scores = {(EVIL, EVIL): reports["dense", "text"]}
    curves = {EVIL: {EVIL: [(0, 1.0), (1, 2.0)]}}
    write_report(hostile, {EVIL: evil}, scores, f"name: {EVIL}", ["enginery", EVIL], path, drawn=Drawn(curves))
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "<script" not in source and "script" not in page.tags and "alert" not in page.tags
    assert source.count("&lt;script&gt;") > 15 and EVIL in html.unescape(page.text)


def test_report_is_the_same_for_the_same_run(tmp_path):
    assert written(tmp_path / "a") == written(tmp_path / "b")


def test_curves_of_prefers_the_artifacts_and_takes_events_else(store):
    _, kept = sealed(store, {"curve.json": json.dumps({"kl": [[0, 1.0], [9, 0.5]]}).encode()})
    _, bare = sealed(store, {"a": b"1"}, stage="prune")
    events = [
        {"event": "metric", "step": s, "name": "kl", "value": 3.0, "at_step": 2} for s in ("healed", "pruned", "x")
    ]
    found = curves_of(store, {"healed": kept, "pruned": bare, "dense": bare}, [{"event": "note"}, *events])
    assert found == {"healed": {"kl": [(0.0, 1.0), (9.0, 0.5)]}, "pruned": {"kl": [(2.0, 3.0)]}}
    gone = kept.model_copy(update={"files": {"curve.json": FileEntry(sha256="0" * 64, size=1)}})
    assert curves_of(store, {"healed": gone}) == {}


def shapes(chart, tag):
    root = ElementTree.fromstring(str(chart))
    return [shape.attrib for shape in root.iter(tag)]


def test_steps_chart_draws_lengths_and_places_in_proportion():
    rows = [("a", 200.0, {"t": 10.0, "u": 30.0}), ("b", 100.0, {"t": 20.0}), ("c", None, {"t": math.nan})]
    chart = steps_chart(rows, ["t", "u"], "perplexity")
    widths = [float(shape["width"]) for shape in shapes(chart, "rect")]
    assert widths[0] == pytest.approx(2 * widths[1]) and len(widths) == 2
    dots = [s for s in shapes(chart, "circle") if float(s["cy"]) > 20]
    by_class = {(s["class"], s["cy"]): float(s["cx"]) for s in dots}
    t10, u30, t20 = by_class.values()
    first = next(float(s["cx"]) for s in shapes(steps_chart(rows, ["t", "u"], "pseudo-perplexity"), "circle"))
    assert first - 5 > 540 + 8 * len("pseudo-perplexity"), "the legend stands behind the title"
    assert t20 - t10 == pytest.approx(u30 - t20, abs=0.2) and t10 < t20 and len(dots) == 3


def test_interval_chart_shades_the_forbidden_side():
    upper = interval_chart(1.1, 1.0, 1.2, 1.25, upper=True)
    (beyond,), (dot,) = shapes(upper, "rect"), shapes(upper, "circle")
    assert float(dot["cx"]) < float(beyond["x"])
    lower = interval_chart(0.9, 0.85, 0.95, 0.8, upper=False)
    (beyond,), (dot,) = shapes(lower, "rect"), shapes(lower, "circle")
    assert float(dot["cx"]) > float(beyond["x"]) + float(beyond["width"])


def test_curve_chart_follows_the_points_and_skips_what_is_not_finite():
    (curve,) = shapes(curve_chart("kl", [(0, 4.0), (1, math.nan), (2, 1.0), (4, 2.0)]), "polyline")
    points = [tuple(map(float, pair.split(","))) for pair in curve["points"].split()]
    assert len(points) == 3 and points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] > points[2][1] > points[0][1]  # pixels grow downwards
    assert (points[1][0] - points[0][0]) == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert curve_chart("kl", [(0, math.inf)]) == "" and "circle" in curve_chart("kl", [(0, 1.0)])
    assert ">0.01<" in curve_chart("kl", [(0, 10.0), (1, 0.005)])


def test_scales_and_ticks_stand_on_round_numbers():
    assert (
        ticks(0, 100) == [0, 20, 40, 60, 80, 100]
        and ticks(3, 3) == [3]
        and ticks(0.11, 0.19) == [0.12, 0.14, 0.16, 0.18]
    )
    assert log_ticks(0.02, 30) == [0.1, 1, 10] and log_ticks(2, 30) == [2, 5, 10, 20]
    assert Scale(1, 100, 0, 10, log=True)(10) == 5 and Scale(5, 5, 0, 10)(5) == 5


def test_reproduce_is_a_line_to_paste():
    assert reproduce(["/bin/enginery", "run", "a b"]) == "enginery run 'a b'" and reproduce([]) == ""
    assert reproduce(["/x/flows/__main__.py", "run", "a"]) == "enginery run a"
