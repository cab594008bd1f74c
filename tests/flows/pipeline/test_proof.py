"""The registered model is loaded anew after a promotion; one that answers otherwise than what was judged goes back."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from flows.cli import main
from flows.pipeline.steps import end
from flows.registry import projection
from flows.registry.asking import ANY, NEAR, TEXTS, alike, engines_answers, questions
from flows.registry.going_back import rolled_back
from flows.registry.journal import history
from flows.registry.projection import drift
from stages import STAGES
from stages.measures.items import HARNESS, ITEMS
from tests.flows import definitions
from tests.flows.pipeline.test_champion import made, model, registry_of, store_of
from tests.flows.pipeline.tiny_run import MADE, Place
from tests.flows.recorded import migrated
from tests.flows.registry.test_served import FOLLOWS, WORDS, chain

TOLD = "the registered model's answers"


def texts(params, inputs, output, progress):
    lines = [{"id": str(n), "text": f"  the {WORDS[1 + n % 9]} of {WORDS[1 + n // 2 % 9]}"} for n in range(20)]
    (output / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {}


def answering(params, inputs, output, progress):
    """A real engine of the words of test_served; the graph's bytes beside it keep engines of other models apart."""
    shutil.rmtree(output)
    chain(output)
    shutil.copyfile(inputs["graph"] / "model.onnx", output / "made_from")
    return {"size_bytes": 7.0}


def scored(params, inputs, output, progress):
    model = inputs["model"]
    worse = (model / ("made_from" if (model / "made_from").is_file() else "model.onnx")).read_bytes()
    rows = [
        {"id": f"d{i}", "tokens": 10, "nll": 20.0 + i % 3 + 10 * float(worse.removeprefix(b"weights") or 0)}
        for i in range(8)
    ]
    said = {"artifact_target": "onnxruntime:cpu", "measures": {"perplexity": 8.0}, "documents": rows, "corpus": "c"}
    (output / "report.json").write_text(json.dumps(said))
    return {"perplexity": 8.0}


CORPUS = replace(definitions.CORPUS, run=texts)
COMPILE = replace(definitions.COMPILE, run=answering)
VALIDATE = replace(definitions.VALIDATE, run=scored)
OURS = {**MADE, **dict.fromkeys(("corpus", "compile", "validate"), __name__)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    root, before = tmp_path / "root", dict(os.environ)
    root.mkdir()
    shutil.copy(migrated(), root / "mlflow.db")
    for name, module in OURS.items():
        monkeypatch.setitem(STAGES, name, f"{module}:{name.upper()}")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("ENGINERY_LAUNCHER", "inline")
    monkeypatch.setattr("flows.pipeline.finish.BRIEFLY_S", 0)
    yield Place(root, tmp_path, "words")
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def packing(monkeypatch, change):
    """Have the package go wrong: what is registered is not quite the engine that was judged."""
    whole = projection.logged_model

    def wrong(tracking, engine, name, fingerprint, run):
        other = Path(tracking.uri.removeprefix("sqlite:///")).with_name("other")
        shutil.copytree(engine, other)
        change(other)
        return whole(tracking, other, name, fingerprint, run)

    monkeypatch.setattr(projection, "logged_model", wrong)


def other_words(folder):
    graph = onnx.load(folder / "model.onnx")
    table = numpy_helper.to_array(graph.graph.initializer[0]).copy()
    table[:, WORDS.index("rome")] += 50
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    onnx.save(graph, folder / "model.onnx")


def asked_lines(place):
    return [line for line in place.terminal.lines if "was loaded anew and answers" in line]


@pytest.mark.fault
def test_registered_model_is_loaded_anew_and_asked_once(place):
    result = place.run()
    assert result.passed and result.model.undone == "" and place.loose == []
    assert asked_lines(place) == ["words@champion was loaded anew and answers 10 of 10 texts as the judged engine"]
    assert [gate.measure for gate in result.gates] == ["perplexity"]
    assert place.run().passed and len(asked_lines(place)) == 1  # what has answered is not asked again


@pytest.mark.fault
def test_first_version_that_answers_otherwise_is_withdrawn(place, monkeypatch, capsys):
    packing(monkeypatch, other_words)
    words = ["--store", str(place.root / "store")]
    assert main(["run", str(place.recipe), *words]) == 2
    said, result = capsys.readouterr().out, place.record.result
    assert not result.passed and result.verdict == place.state == "gate failed"
    (gate,) = [one for one in result.gates if not one.passed]
    assert (gate.measure, gate.limit) == ("registered_answers", 10.0) and gate.measured < 10
    assert "it answers otherwise" in gate.text and "gate failed: the registered words version 1" in said
    assert "registered: words version 1; champion went back to no version" in said
    assert "which no alias serves" in (place.record.folder / "report.html").read_text()
    entries = history(store_of(place).objects, "words")
    assert [(one.action, one.previous, one.by_person) for one in entries] == [
        ("promote", None, False),
        ("withdraw", "1", False),
    ]
    assert gate.text.removesuffix(": FAILED") in entries[1].why and rolled_back(entries)
    assert place.alias == "" and drift(registry_of(place), "words") == []
    followed = place.followed(result.run)
    assert followed.info.status == "FAILED" and followed.data.tags["enginery.verdict"] == "gate failed"
    assert "enginery.version" not in followed.data.tags
    assert main(["explain", result.run, *words]) == 0 and "champion went back to no version" in capsys.readouterr().out
    assert main(["models", *words]) == 0 and "champion" not in capsys.readouterr().out
    # By itself it does not come back, and there is no champion to be judged against.
    place.gates = ("measure: size_bytes, artifact: cpu, against: champion, at_most: 9",)
    again = place.run()
    assert len(history(store_of(place).objects, "words")) == 2 and place.alias == ""
    assert "no champion" in again.gates[-1].text and any("was rolled back by" in one for one in place.terminal.lines)
    # Nor does the run that says so claim that it had.
    assert again.passed and "was rolled back by" in again.model.undone and again.model.version == "1"
    assert "which no alias serves" in (place.record.folder / "report.html").read_text()
    assert "enginery.version" not in place.followed(again.run).data.tags
    assert main(["explain", again.run, *words]) == 0 and "as champion" not in capsys.readouterr().out


@pytest.mark.fault
def test_later_version_that_answers_otherwise_gives_the_alias_back_to_the_one_before(place, monkeypatch):
    assert place.run(model(0.5)).passed
    packing(monkeypatch, other_words)
    result = place.run(model(0.3))
    assert not result.passed and result.model.undone == "champion went back to version 1" and place.alias == "1"
    entries = history(store_of(place).objects, "words")
    assert [(one.action, one.version.number) for one in entries] == [
        ("promote", "1"),
        ("promote", "2"),
        ("rollback", "1"),
    ]
    assert entries[2].why.startswith(f"run {result.run}: ") and entries[2].against == 2


@pytest.mark.fault
def test_registered_model_that_does_not_open_gives_the_alias_back(place, monkeypatch):
    packing(monkeypatch, lambda folder: (folder / "tokenizer.json").unlink())
    result = place.run()
    (gate,) = [one for one in result.gates if not one.passed]
    assert "has no tokenizer.json" in gate.text and gate.measured == 0 and place.alias == ""


@pytest.mark.fault
def test_model_that_mlflow_does_not_give_out_is_said_not_to_have_been_asked(place, monkeypatch):
    whole = projection.logged_model

    def lost(*args):
        made = whole(*args)
        shutil.rmtree(made.artifact_location.removeprefix("file://"))
        return made

    monkeypatch.setattr(projection, "logged_model", lost)
    result = place.run()
    assert result.passed and place.alias == "1"
    (told,) = {(one["what"], one["remedy"]) for one in place.loose}
    assert told[0] == TOLD and "was not loaded and asked" in told[1]
    assert any("MLflow does not give out models:/words@champion" in one for one in place.terminal.lines)
    assert len(history(store_of(place).objects, "words")) == 1


@pytest.mark.fault
def test_alias_that_another_moved_meanwhile_is_left_where_it_stands(place, monkeypatch):
    """Somebody promotes between the answers and the way back: the journal refuses to undo what is no longer there."""
    packing(monkeypatch, other_words)
    whole = projection.append

    def overtaken(objects, name, alias, action, choose, why, against=None):
        if action == "withdraw":
            (entry,) = history(objects, name)
            whole(objects, name, alias, "promote", lambda _: entry.version.model_copy(update={"number": "7"}), "mine")
        return whole(objects, name, alias, action, choose, why, against)

    monkeypatch.setattr(projection, "append", overtaken)
    with place.session() as session:
        result = end(made(session))
    assert not result.passed and result.model.undone == "champion had moved on by then"
    assert [one.action for one in history(store_of(place).objects, "words")] == ["promote", "promote"]


def test_questions_are_beginnings_and_prompts_of_each_corpus_in_turn(tmp_path):
    one, two = tmp_path / "text", tmp_path / "items"

    def item(n):
        about = {"task": "question", "context": "It is here."} if n == 1 else {}
        return {"id": str(n), "ability": "a", "prompt": f"{n} is", "answers": ["x"]} | about

    for folder, lines, about in (
        (one, [{"id": "a", "text": f"\n{n} " + "word " * 40} for n in range(3)], {}),
        (one, [{"id": "b", "messages": [{"role": "user", "content": "Say it"}]}], {}),
        (two, [item(n) for n in range(30)], {ITEMS: []}),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "corpus.json").write_text(json.dumps(about))
        with (folder / "test.jsonl").open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
    found = questions([one, two], "test")
    assert len(found) == TEXTS and found[1:6:2] == [("0 is",), ("1 is", "It is here."), ("2 is",)]
    assert found[6] == ("Say it",) and found[-1] == ("5 is",)
    assert found[0][0].startswith("0 word") and len(found[0][0]) <= 60
    (two / "corpus.json").write_text(json.dumps({ITEMS: [], HARNESS: {}}))
    assert questions([two], "test") == []


def test_what_an_engine_cannot_read_is_not_asked_and_something_always_is(tmp_path):
    folder = chain(tmp_path / "engine")
    facts = json.loads((folder / "engine.json").read_text()) | {"maximum_tokens": 3}
    (folder / "engine.json").write_text(json.dumps(facts))
    asked, said = engines_answers(folder, [("the capital of france",), ("is",)])
    assert asked == [("is",)] and len(said) == 1
    asked, said = engines_answers(folder, [("the capital of france",)])
    assert asked and set(asked) <= {(one,) for one in ANY} and len(said) == len(asked)


def test_logits_are_alike_but_for_the_order_of_sums(tmp_path):
    folder = chain(tmp_path / "engine")
    facts = json.loads((folder / "engine.json").read_text()) | {"task": "embed"}
    (folder / "engine.json").write_text(json.dumps(facts))
    _, said = engines_answers(folder, [("the capital",), ("is",)])
    assert len(said[0]) == 2 * len(WORDS) and said[1][WORDS.index(FOLLOWS["is"])] == 9
    near = [list(np.array(one) * (1 + NEAR / 2)) for one in said]
    assert alike(said, near) == 2 and alike(said, [near[0], [0.0] * len(WORDS)]) == 1 and alike(said, [[], []]) == 0
