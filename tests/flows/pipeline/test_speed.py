"""A run that is judged by speed, too: the gate holds, and report, MLflow and card say it beside quality."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import json
from pathlib import Path

import pytest

from flows.registry.model_card import CARD
from stages.adapters.connect import connect
from tests.flows.pipeline.test_main_job import enginery
from tests.flows.pipeline.tiny_run import place, sealed  # noqa: F401

TWICE = "measure: decode_tokens_per_s, against: dense, at_least: 2"


def test_run_judged_by_speed_shows_it_beside_quality_and_promotes(place):
    place.gates = (TWICE,)
    result = place.run("judge.speed=true")
    assert result.passed and place.promoted
    (step,) = [one for one in result.steps if one.name == "bench-cpu"]
    assert (step.measures, step.corpus, step.device) == ("cpu", "", "a processor x2")
    assert [one.device for one in result.steps if one is not step] == [""] * (len(result.steps) - 1)
    (gate,) = [one for one in result.gates if one.measure == "decode_tokens_per_s"]
    assert (gate.measured, gate.low, gate.artifact, gate.against) == (3.0, 2.5, "cpu", "dense")
    assert "on a processor x2, 2 threads" in gate.text
    page = Path(result.report).read_text(encoding="utf-8")
    assert "Speed on a processor x2" in page and "30; 3 (2.5 to 3.5)" in page and "curve front" in page
    followed = place.followed(result.run)
    metrics = followed.data.metrics
    assert metrics["cpu/decode_tokens_per_s"] == metrics["decode_tokens_per_s"] == 30
    assert metrics["dense/decode_tokens_per_s"] == 10
    assert metrics["cpu/decode_tokens_per_s of dense"] == metrics["decode_tokens_per_s of dense"] == 3
    assert metrics["decode_tokens_per_s of dense low"] == 2.5
    assert metrics["gate/decode_tokens_per_s.cpu.against dense"] == 3
    folder = place.client.download_artifacts(followed.info.run_id, CARD, str(place.folder))
    card = Path(folder).read_text(encoding="utf-8")
    assert "## Speed on a processor x2" in card and "| decode_tokens_per_s | 30 | 3 |" in card


@pytest.mark.parametrize("gate", [TWICE.replace("2", "2.6"), "measure: peak_rss_bytes, at_most: 1e8"])
def test_run_too_slow_or_too_large_promotes_nothing(place, gate):
    place.gates = (gate,)
    result = place.run("judge.speed=true")
    assert not result.passed and not place.promoted
    assert [one.passed for one in result.gates] == [True, False]


TIMED = """\
recipe: 1
name: timed
steps:
  - {name: dense, stage: fetch, params: {source: checkpoint}}
  - {name: text, stage: corpus, params: {source: "pydoc://topics", splits: {test: 1.0}}}
  - {name: graph, stage: export, inputs: {model: dense}}
  - {name: cpu, stage: compile, inputs: {graph: graph}, params: {backend: onnxruntime}}
judge: {artifacts: [cpu], baseline: dense, corpora: [text], windows: 2, window_tokens: 128, trace: false, speed: true}
gates:
  - {measure: decode_tokens_per_s, against: dense, at_least: 1.0e-3}
"""


@pytest.mark.fault
def test_run_times_a_real_engine_beside_the_dense_model_and_finds_it_again(tmp_path, tiny):
    (tmp_path / "timed.yaml").write_text(TIMED)
    command = ["run", tmp_path / "timed.yaml", "--json", "--store", tmp_path / "store"]
    command += ["--set", f"steps.dense.params.source={tiny}", "--threads", "1"]
    first, again = (enginery(*command, home=tmp_path)[0] for _ in range(2))
    assert first["passed"] and first["gates"][0]["target"] == "onnxruntime:cpu"
    (step,) = [one for one in first["steps"] if one["stage"] == "bench"]
    report = json.loads((connect(str(tmp_path / "store")).checkout(step["fingerprint"]) / "report.json").read_text())
    assert step["device"] == report["executor"]["device"] and step["device"] in first["gates"][0]["text"]
    assert report["speed"]["artifact"]["threads"] == report["speed"]["baseline"]["threads"] == 1
    assert first["gates"][0]["measured"] == report["speed"]["ratios"]["decode_tokens_per_s"][0]
    assert [one["cached"] for one in again["steps"]] == [True] * len(again["steps"])
    assert "token p99, ms" in Path(first["report"]).read_text(encoding="utf-8")
