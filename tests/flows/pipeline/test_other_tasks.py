"""Whole runs of tiny random models of other tasks, with items, through the command line: gates and the report."""

import json
import re

import pytest

from tests.flows.pipeline.test_main_job import enginery
from tests.stages.validate.words import lively, model

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

SENTENCES = ("the cats sat on a mat", "dog , who was big", "romans sat smally in paris", "where is it ?", "a cat")
CONTEXT = "the cats sat on a mat . a big dog was in rome , where it sat in paris . who is small ? "
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
JUDGED = """
  - {name: graph, stage: export, inputs: {model: int8}}
  - {name: cpu, stage: compile, inputs: {graph: graph}, params: {backend: onnxruntime, maximum_tokens: 64}}
judge: {artifacts: [cpu], baseline: dense, corpora: [asked]}
"""
TORCH = "judge: {artifacts: [int8], baseline: dense, corpora: [asked]}\n"


def recipe(folder, made, rows, task, judged, gates):
    for name, text in (("asked.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows)), ("text.txt", CONTEXT * 9)):
        (folder / name).write_text(text, encoding="utf-8")
    steps = f"""\
recipe: 1
name: {task}
steps:
  - {{name: dense, stage: fetch, params: {{source: {made}}}}}
  - {{name: text, stage: corpus, params: {{source: {folder}/text.txt, splits: {{calibrate: 1.0}}}}}}
  - {{name: asked, stage: items, params: {{source: {folder}/asked.jsonl, task: {task}}}}}
  - name: int8
    stage: quantize
    inputs: {{model: dense, text: text}}
    params: {{scheme: int8_w8a8, windows: 4, window_tokens: 32}}
{judged.lstrip(chr(10))}gates:
"""
    (folder / "recipe.yaml").write_text(steps + "".join(f"  - {{{one}}}\n" for one in gates), encoding="utf-8")
    return folder / "recipe.yaml"


def ran(folder, path, *, code=0):
    arguments = [path, "--store", folder / "store", "--output", folder / "out"]
    _, said, _ = enginery("run", *arguments, home=folder, code=code)
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return said, re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_tagger_is_judged_as_an_engine(tmp_path):
    made = model("bert_tokens", tmp_path / "models")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(LABELS))}))
    rows = [{"prompt": one, "labels": ["B-PER" if at % 3 else "O" for at, _ in enumerate(one.split())],
             "ability": "news" if n % 2 else "talk"} for n, one in enumerate(SENTENCES * 4)]  # fmt: skip
    gates = ("measure: tag_accuracy, against: dense, worst: true, value_at_least: 0.5",
             "measure: entity_f1, at_least: 0", "measure: flips, against: dense, value_at_most: 0.5")  # fmt: skip
    _, page = ran(tmp_path, recipe(tmp_path, made, rows, "tag", JUDGED, gates))
    assert "entity F1" in page and "right tags" in page and "talk" in page
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [(gate["measure"], gate["passed"]) for gate in result["gates"]] == [
        ("tag_accuracy", True), ("entity_f1", True), ("flips", True)
    ]  # fmt: skip


def test_reader_is_judged_as_an_engine(tmp_path):
    answers = (["rome"], ["cats", "the cats"], [], ["paris"])
    asked = zip(("where is the dog", "who sat", "is it", "where was it"), answers, strict=True)
    rows = [{"prompt": one, "context": CONTEXT * times, "answers": of} for one, of in asked for times in (1, 3)]
    gates = ("measure: answer_f1, value_at_least: 0", "measure: exact_match, at_least: 0.9")
    made = model("bert_answers", tmp_path / "models")
    said, page = ran(tmp_path, recipe(tmp_path, made, rows, "question", JUDGED, gates), code=2)
    assert "answer F1" in page and "exact match" in page
    assert "gate failed: exact_match of cpu" in said.replace("\n", " ")


def test_translator_is_judged_by_texts_and_a_gate_on_right_answers_is_told_why_not(tmp_path):
    made = lively("t5_plain", tmp_path / "models")
    rows = [{"prompt": one, "answers": [SENTENCES[n % 4]]} for n, one in enumerate(SENTENCES * 3)]
    gates = ("measure: chrf, against: dense, value_at_least: 0.01", "measure: kl_divergence, corpus: asked, at_most: 9")
    _, page = ran(tmp_path, recipe(tmp_path, made, rows, "translate", TORCH, gates))
    assert "BLEU" in page and "chrF" in page and "Right answers" not in page
    path = recipe(tmp_path, made, rows, "translate", TORCH, ("measure: accuracy, corpus: asked, at_least: 0.5",))
    _, _, told = enginery("run", path, "--store", tmp_path / "store", home=tmp_path, code=1)
    assert "has no 'right'" in told and "bleu" in told
