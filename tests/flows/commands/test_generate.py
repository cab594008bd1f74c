"""`enginery generate`: however a model is named, it says what it says itself, and a refusal is one line."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.cli import main
from stages.models.anatomy.tasks import longest_text
from stages.serving.engine import open_engine
from stages.serving.reading import answer as answer_in
from stages.serving.reading import choose, classify, tag
from tests.conftest import sealer
from tests.engines import mixed, mixed_graph
from tests.flows.registry.test_served import answer, registered
from tests.flows.test_cli import opened, own_store, sealed
from tests.stages.serving.test_reading import checkpoint

PROMPT = "The for statement is used to"


def said(capsys, *words):
    capsys.readouterr()  # bars of transformers, where a test loaded by it
    assert main(["generate", *map(str, words)]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("\n") and not told.err
    return told.out[:-1]


def test_folder_of_a_checkpoint_says_what_transformers_says(knowing, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(knowing), AutoModelForCausalLM.from_pretrained(knowing)

    def wanted(ids):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    assert said(capsys, knowing, PROMPT, "--max-new-tokens", 9) == wanted(
        tokenizer(PROMPT, return_tensors="pt").input_ids
    )
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt").input_ids
    told = said(capsys, knowing, talk[0]["content"], "--chat", "--max-new-tokens", 9)
    assert told == wanted(ids) != said(capsys, knowing, talk[0]["content"], "--max-new-tokens", 9)


def test_every_option_reaches_the_model(tiny, capsys):
    opened = open_engine(tiny)
    asked = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    (whole,) = opened.generate([PROMPT], **asked)
    assert said(capsys, tiny, PROMPT, *words) == whole
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed"):
        other = {one: value for one, value in asked.items() if one != name}
        assert name == "seed" or opened.generate([PROMPT], **other) != [whole], name
    (by_beams,) = opened.generate([PROMPT], max_new_tokens=12, beams=4)
    assert said(capsys, tiny, PROMPT, "--max-new-tokens", 12, "--beams", 4) == by_beams
    assert by_beams not in opened.generate([PROMPT], max_new_tokens=12)
    stops = [whole[4:6], whole[7:9]]
    cut = said(capsys, tiny, PROMPT, *words, "--stop", stops[0], "--stop", stops[1])
    assert cut == whole[: min(whole.index(one) for one in stops)]


def test_engine_of_a_store_is_found_by_its_step_and_its_fingerprint(shared_store, mixed_graph, capsys):
    made = sealer(shared_store)("compile", {"backend": "onnxruntime"}, graph=mixed_graph.name)
    wanted = open_engine(shared_store.checkout(made.identity)).generate([PROMPT], max_new_tokens=5)[0]
    store = ["--store", shared_store.uri, "--max-new-tokens", 5]
    assert said(capsys, made.identity[:12], PROMPT, *store) == wanted
    assert said(capsys, mixed_graph.name, PROMPT, *store) == wanted


def test_registered_model_answers_by_its_alias_and_its_version(registered, capsys, monkeypatch):
    uri, folder = registered
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = sorted(path for path in folder.rglob("*"))
    for model in ("models:/chain@champion", "models:/chain/1"):
        assert said(capsys, model, "italy and", "--max-new-tokens", 3) == answer(["and"], 3)
    assert said(capsys, model, "france", "--chat", "--max-new-tokens", 3) == answer(["and"], 3)
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.parametrize("model", ["chain@champoin", "chian@champion", "chain/7"])
def test_name_that_is_not_registered_is_said_with_where_to_look(registered, capsys, monkeypatch, model):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered[0])
    assert main(["generate", f"models:/{model}", "italy"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: there is no registered model models:/{model}; measured MLflow")
    assert told.endswith("not found. `enginery models` lists models, versions and aliases.\n")


def test_registered_engine_of_changed_bytes_is_refused(registered, tmp_path, capsys, monkeypatch):
    uri, folder = registered
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    weights = next(folder.rglob("model.onnx"))
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + b"\x00")
        assert main(["generate", "models:/chain@champion", "italy"]) == 1
    finally:
        weights.write_bytes(kept)
    assert "model.onnx of models:/chain@champion is not what was judged; measured" in capsys.readouterr().err


def test_registered_model_whose_files_are_gone_is_named_with_a_way_on(registered, tmp_path, capsys, monkeypatch):
    uri, folder = registered
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    files = next(folder.rglob("MLmodel")).parent
    files.rename(tmp_path / "away")
    try:
        assert main(["generate", "models:/chain@champion", "italy"]) == 1
    finally:
        (tmp_path / "away").rename(files)
    said = capsys.readouterr().err
    assert "MLflow has lost the files of models:/chain@champion" in said and "Run its recipe again" in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--max-new-tokens", "100000"], "max_new_tokens is more than the model reads; measured 100000; limit"),
        (["--temperature", "nan"], "temperature is out of range; measured nan; limit a number from 0 on"),
        (["--top-p", "0"], "top_p is out of range; measured 0.0"),
        (["--chat"], "the model has no chat template; measured none beside its tokenizer"),
        (["--stop", ""], "stop strings are out of range"),
    ],
)
def test_what_is_out_of_range_is_one_line(tiny, capsys, words, text):
    assert main(["generate", str(tiny), PROMPT, *words]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {text}") and told.err.count("\n") == 1 and not told.out


def test_model_that_is_not_there_is_one_line(capsys, tmp_path, monkeypatch, opened):
    sealed(opened, "one", {"x": b"1"})
    for model, text in [("nothing", "nothing"), ("models:/no@champion", "no registered model models:/no@champion")]:
        assert main(["generate", model, "a"]) == 1
        told = capsys.readouterr()
        assert text in told.err and told.err.count("\n") == 1, told.err
    assert main(["generate", "one", "a"]) == 1
    assert "holds no engine, graph or checkpoint" in capsys.readouterr().err


def test_answer_is_printed_while_it_is_written(tiny):
    words = [sys.executable, "-m", "flows", "generate", str(tiny), PROMPT, "--max-new-tokens", "200"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "0"}) as child:
        first = os.read(child.stdout.fileno(), 1 << 16)
        running = child.poll() is None
        rest = child.stdout.read()
    assert child.returncode == 0 and first and rest and running
    (whole,) = open_engine(tiny).generate([PROMPT], max_new_tokens=200)
    assert (first + rest).decode() == whole + "\n"


def test_model_that_writes_no_text_says_what_it_is_for_as_json(tmp_path, capsys):
    tagger, reader, classes = (checkpoint(name, tmp_path) for name in ("bert_tokens", "bert_answers", "bert_classes"))
    found = [vars(one) for one in tag(open_engine(tagger), ["a b c"])[0]]
    assert json.loads(said(capsys, tagger, "a b c")) == found
    told = json.loads(said(capsys, reader, "a b", "--context", "c d e f"))
    assert told == vars(answer_in(open_engine(reader), "a b", "c d e f"))
    pair, alone = (json.loads(said(capsys, classes, "a", *more)) for more in (["--context", "b"], []))
    wanted = [classify(open_engine(classes), [one])[0][0] for one in (("a", "b"), "a")]
    assert [one["score"] for one in (pair, alone)] == [one.score for one in wanted]
    chooser = checkpoint("bert_choices", tmp_path)
    told = json.loads(said(capsys, chooser, "a b", "--context", "c d | e | f f"))
    by_place = sorted(choose(open_engine(chooser), "a b", ["c d", "e", "f f"]), key=lambda one: one.choice)
    assert told["scores"] == [one.score for one in by_place]
    assert told["text"] == by_place[told["choice"]].text and told["score"] == max(told["scores"])
    for words, text in (
        (
            [reader, "a b"],
            "the columns are not those that the model is asked by; measured question; limit",
        ),
        ([tagger, "a", "--context", "b"], "measured text, context; limit text"),
        (
            [tagger, "a", "--top-k", 3],
            "so that there is nothing to say of how; measured --top-k; limit --context",
        ),
        ([tagger, "a", "--chat"], "measured --chat"),
    ):
        assert main(["generate", *map(str, words)]) == 1
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error


def test_model_that_writes_takes_no_context(tiny, capsys):
    assert main(["generate", str(tiny), PROMPT, "--context", "a"]) == 1
    assert "a model that writes takes no context" in capsys.readouterr().err


def test_checkpoint_whose_positions_have_no_end_is_asked_with_one(tiny, monkeypatch, capsys):
    from stages.serving import engine

    endless = dataclasses.replace(open_engine(tiny), maximum_tokens=engine.ENDLESS)
    monkeypatch.setattr(engine, "open_engine", lambda *_, **__: endless)
    most = longest_text(json.loads((tiny / "tokenizer_config.json").read_text()).get("model_max_length"))
    for command in (["generate", tiny, "a"], ["chat", tiny]):
        assert main([*map(str, command), "--max-new-tokens", str(most + 1)]) == 1
        assert f"max_new_tokens is more than the model reads; measured {most + 1}" in capsys.readouterr().err
    assert [longest_text(one) for one in (None, 10**30, 512, 0, "many")] == [2048, 2048, 512, 2048, 2048]
