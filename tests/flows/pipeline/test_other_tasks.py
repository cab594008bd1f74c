"""Models of other tasks that learned what they are for, through the whole pipeline and the command line to answers."""

from __future__ import annotations

import json
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import taught
from tests.conftest import cached_models
from tests.flows.pipeline.test_main_job import PLAIN, enginery, steps

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

RECIPE = """\
recipe: 1
name: {name}
steps:
  - {{name: dense, stage: fetch, params: {{source: {made}}}}}
  - name: text
    stage: corpus
    params: {{source: {folder}/text.jsonl, near_duplicate: 1, splits: {{calibrate: 0.3, train: 0.5, validate: 0.2}}}}
  - {{name: asked, stage: items, params: {{source: {folder}/asked.jsonl, task: {task}, language: {language}}}}}
  - name: cut
    stage: {cut}
    inputs: {{model: dense, text: text}}
    params: {{method: {method}, keep: {keep}, windows: 16, window_tokens: {tokens}}}
  - name: healed
    stage: recover
    inputs: {{model: cut, teacher: dense, text: text}}
    params: {{tokens: {learned}, window_tokens: {tokens}, batch_windows: 8, learning_rate: 3e-4, check_every_steps: 16}}
  - name: int8
    stage: quantize
    inputs: {{model: healed, text: text}}
    params: {{scheme: int8_w8a8, windows: 8, window_tokens: {tokens}}}
  - {{name: graph, stage: export, inputs: {{model: int8}}}}
{plan}  - {{name: cpu, stage: compile, inputs: {{graph: graph}}, params: {{backend: onnxruntime, maximum_tokens: 64}}}}
judge: {{artifacts: [{judged}], baseline: dense, corpora: [asked]}}
gates:
{gates}register: {{model: {name}, alias: champion}}
"""
PLAN = """\
  - name: gpu
    stage: compile
    inputs: {graph: graph}
    params: {backend: tensorrt_rtx, architectures: [sm_89], maximum_tokens: 64}
"""
ASK = """
import json, sys, mlflow
sys.path[:] = [p for p in sys.path if 'site-packages' in p or 'lib/python' in p]
print(json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict(json.loads(sys.argv[2]))))
"""


@dataclass(frozen=True)
class Task:
    """What is put through.

    Attributes:
        name: of the model.
        task: of its items.
        draw: gives a sentence.
        item: of a sentence, with what is right.
        row: of a sentence, for the text that it is compressed on.
        tokens: of a window.
        cut: stage, method and share of the blocks' parameters that stays.
        gates: which a good compression passes, by figures of its own beside dense's.
        language: of the items.
        plan: a plan is built, too.
    """

    name: str
    task: str
    draw: Callable[[random.Random], tuple[Any, ...]]
    item: Callable[..., Mapping[str, Any]]
    row: Callable[..., Mapping[str, Any]]
    tokens: int
    cut: tuple[str, str, float]
    gates: tuple[str, ...]
    language: str = "en"
    plan: bool = True


TRANSLATOR = Task(
    "translator",
    "translate",
    taught.sentence,
    lambda asked, said: {"prompt": asked, "answers": [said]},
    lambda asked, said: {"prompt": asked, "completion": said},
    17,
    ("prune", "channels", 0.7),
    ("measure: chrf, against: dense, value_at_least: 0.95", "measure: bleu, against: dense, at_least: 0.9"),
    plan=False,
)
READER = Task(
    "reader",
    "question",
    taught.question,
    lambda asked, context, answer: {"prompt": asked, "context": context, "answers": [answer]},
    lambda asked, context, _: {"prompt": asked, "completion": context},
    32,
    ("share", "basis", 0.4),
    ("measure: answer_f1, against: dense, at_least: 0.9", "measure: exact_match, against: dense, value_at_least: 0.9"),
)
TAGGER = Task(
    "tagger",
    "tag",
    taught.tagged,
    lambda text, labels: {
        "prompt": text,
        "labels": labels,
        "ability": "several names" if labels.count("B-PER") > 1 else "one name",
    },
    lambda text, _: {"text": text},
    32,
    ("prune", "channels", 0.7),
    (
        "measure: entity_f1, against: dense, at_least: 0.9",
        "measure: tag_accuracy, against: dense, worst: true, value_at_least: 0.95",
        "measure: flips, against: dense, value_at_most: 0.1",
    ),
    language="zh",
)


def written(folder: Path, of: Task) -> Path:
    """The recipe of a task, its text and its items."""
    _, asked, text = taught.apart(of.draw)
    for name, rows in (("asked", [of.item(*one) for one in asked]), ("text", [of.row(*one) for one in text])):
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    cut, method, keep = of.cut
    given = {"cut": cut, "method": method, "keep": keep, "learned": 64 * 8 * of.tokens}
    given |= {"plan": PLAN if of.plan else ""}
    given |= {"made": taught.taught(of.name, cached_models()), "folder": folder, "tokens": of.tokens}
    given |= {"name": of.name, "task": of.task, "language": of.language}
    given |= {"judged": "cpu, gpu" if of.plan else "cpu", "gates": "".join(f"  - {{{one}}}\n" for one in of.gates)}
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(**given), encoding="utf-8")
    return path


def ran(folder: Path, path: Path, *words: Any, code: int = 0) -> tuple[dict[str, Any], str]:
    arguments = [path, "--store", folder / "store", "--output", folder / "out", "--launcher", "inline", "--json"]
    result, _, told = enginery("run", *arguments, *words, home=folder, code=code)
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert result is not None
    return result, told + re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def promoted_and_recovered(result: dict[str, Any], of: Task) -> None:
    """The run passed, recovery won back most of what the cut lost, and the engine's measures are dense's or near."""
    assert result["passed"] and all(one["passed"] for one in result["gates"]), result["gates"]
    assert {one["measure"] for one in result["gates"]} >= {re.findall(r"measure: (\w+)", gate)[0] for gate in of.gates}
    assert result["model"]["version"] == "1" and result["model"]["undone"] == ""
    healed = steps(result)["healed"]["metrics"]
    assert healed["kl_text_after"] < 0.7 * healed["kl_text_before"]
    cut = steps(result)["cut"]["metrics"]
    assert cut["block_parameters"] <= of.cut[2] * cut["block_parameters_before"]


def served(folder: Path, of: Task, asked: Any) -> Any:
    """What the registered model says to who knows MLflow and nothing of the project."""
    env = {**PLAIN, "HOME": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/store/state/mlflow.db"}
    words = [sys.executable, "-W", "ignore", "-c", ASK, f"models:/{of.name}@champion", json.dumps(asked)]
    done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def generated(folder: Path, of: Task, *words: str) -> str:
    """What the command says."""
    _, said, _ = enginery("generate", f"models:/{of.name}@champion", *words, "--store", folder / "store", home=folder)
    return said.strip()


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text(encoding="utf-8").splitlines()]


def test_translator_goes_the_whole_way_and_its_alias_translates(tmp_path):
    result, page = ran(tmp_path, path := written(tmp_path, TRANSLATOR))
    promoted_and_recovered(result, TRANSLATOR)
    assert "BLEU" in page and "chrF" in page and "Right answers" not in page
    asked = items(tmp_path)
    said = served(tmp_path, TRANSLATOR, [one["prompt"] for one in asked])
    assert sum(text == one["answers"][0] for text, one in zip(said, asked, strict=True)) >= 0.9 * len(asked)
    right = next(one for one, text in zip(asked, said, strict=True) if text == one["answers"][0])
    assert generated(tmp_path, TRANSLATOR, right["prompt"]) == right["answers"][0]
    wrong = ("--launcher", "inline", "--set", "gates.0.measure=accuracy", "--set", "gates.0.corpus=asked")
    _, _, told = enginery("run", path, "--store", tmp_path / "store", *wrong, home=tmp_path, code=1)
    assert "has no 'right'" in told and "bleu" in told


def test_reader_goes_the_whole_way_and_its_alias_finds_answers(tmp_path):
    result, page = ran(tmp_path, path := written(tmp_path, READER))
    promoted_and_recovered(result, READER)
    assert "answer F1" in page and "exact match" in page
    asked = items(tmp_path)
    said = served(tmp_path, READER, [{"question": one["prompt"], "context": one["context"]} for one in asked])
    for found, one in zip(said, asked, strict=True):
        assert one["context"][found["start"] : found["end"]] == found["text"]
    right = [one for one, found in zip(asked, said, strict=True) if found["text"] == one["answers"][0]]
    assert len(right) >= 0.9 * len(asked)
    told = json.loads(generated(tmp_path, READER, right[0]["prompt"], "--context", right[0]["context"]))
    assert told["text"] == right[0]["answers"][0]
    with sqlite3.connect(tmp_path / "store" / "state" / "mlflow.db") as database:
        ((described,),) = database.execute("select description from registered_models").fetchall()
    assert 'model.predict([{"question": "' in described and '"context": "' in described
    # What lost too much and was hardly healed is not promoted.
    few = ("--set", "steps.cut.params.keep=0.18", "--set", "steps.healed.params.tokens=2048")
    broken, _ = ran(tmp_path, path, *few, code=2)
    assert broken["model"] is None and not broken["passed"]
    assert {"answer_f1", "exact_match"} == {one["measure"] for one in broken["gates"] if not one["passed"]}


def test_tagger_of_chinese_goes_the_whole_way_and_its_alias_finds_names(tmp_path):
    result, page = ran(tmp_path, written(tmp_path, TAGGER))
    promoted_and_recovered(result, TAGGER)
    assert "entity F1" in page and "right tags" in page and "several names" in page
    asked = items(tmp_path)
    said = served(tmp_path, TAGGER, [one["prompt"] for one in asked])
    found = [[(one["label"], one["text"]) for one in each] for each in said]
    right = [one for one, each in zip(asked, found, strict=True) if each == names(one["prompt"], one["labels"])]
    assert len(right) >= 0.9 * len(asked) and any("PER" in each[0] for each in found if each)
    told = json.loads(generated(tmp_path, TAGGER, right[0]["prompt"]))
    assert [(one["label"], one["text"]) for one in told] == names(right[0]["prompt"], right[0]["labels"])


def names(text: str, labels: list[str]) -> list[tuple[str, str]]:
    """The entities of a sentence, by its labels."""
    found: list[tuple[str, str]] = []
    for sign, label in zip(text, labels, strict=True):
        if label.startswith("B-"):
            found.append((label[2:], sign))
        elif label.startswith("I-"):
            found[-1] = (found[-1][0], found[-1][1] + sign)
    return found
