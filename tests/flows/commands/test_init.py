"""The recipe that `init` writes: of steps that take the checkpoint, and judged by what the model is for."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from flows.cli import main
from flows.recipe.expand import expanded
from flows.recipe.model import Recipe
from flows.recipe.read import load_recipe
from flows.running.admission import refuse_inadmissible
from flows.running.plan import resolve
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.stages.models.families import FAMILIES, WIDER, family


def checkpoint(name: str, root: Path) -> Path:
    folder = family(name, root)
    words = Tokenizer(WordLevel({"[UNK]": 0, "[MASK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]").save_pretrained(folder)
    return folder


def written(name: str, root: Path) -> Recipe:
    (root / "a.txt").write_text("words")
    assert main(["init", str(checkpoint(name, root)), str(root / "a.txt"), "-o", str(root / "mine.yaml")]) == 0
    return load_recipe(root / "mine.yaml")


def test_init_writes_a_recipe_that_plans(tmp_path, capsys):
    model, text, out = tmp_path / "My Model", tmp_path / "a.txt", tmp_path / "mine.yaml"
    checkpoint("llama", tmp_path).rename(model)
    text.write_text("words")
    assert main(["init", str(model), str(text), "-o", str(out)]) == 0
    assert f"enginery run {out}" in capsys.readouterr().out
    recipe = load_recipe(out)
    assert recipe.name == "my-model"
    assert [step.name for step in recipe.steps][4:8] == ["shared", "pruned", "healed", "int8"]
    assert recipe.step("dense").params["source"] == model.as_uri()
    assert recipe.step("text").params["source"] == text.as_uri()
    assert main(["init", str(model), str(text), "-o", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "none"), str(text), "-o", str(tmp_path / "b.yaml")]) == 1
    assert not (tmp_path / "b.yaml").exists()


def test_init_of_what_lies_elsewhere_says_that_it_was_not_seen(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("words")
    assert main(["init", "hf://owner/Name-1.5B", str(tmp_path / "a.txt"), "-o", str(tmp_path / "c.yaml")]) == 0
    assert "cannot be seen from here" in capsys.readouterr().out
    assert load_recipe(tmp_path / "c.yaml").name == "name-1.5b"


def test_init_refuses_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("words")
    out = tmp_path / "c.yaml"
    assert main(["init", str(tmp_path / "empty"), str(tmp_path / "a.txt"), "-o", str(out)]) == 1
    assert not out.exists() and "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILIES | WIDER)
def test_every_familys_recipe_is_admitted_and_its_comments_are_of_its_steps(name, store, tmp_path):
    recipe = written(name, tmp_path)
    planned = resolve(expanded(recipe).steps, store, lambda _: Silent())
    said: list[str] = []
    refuse_inadmissible(planned, recipe, store, said.append)
    assert not said
    assert recipe.gates and len(recipe.steps) > 3
    text = (tmp_path / "mine.yaml").read_text()
    methods = {step.params.get("method") for step in recipe.steps} | {step.stage for step in recipe.steps}
    for words, of in {"low-rank bases": "basis", "channels of": "channels", "Heal on": "recover"}.items():
        assert (words in text) == (of in methods), words
    assert not re.search(r"\{\{|\{%", text)


def test_model_that_cannot_write_by_itself_is_asked_all_the_same(tmp_path, capsys):
    model = checkpoint("llama", tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": None, "eos_token_id": None}))
    (tmp_path / "a.txt").write_text("words")
    assert main(["init", str(model), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]) == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.step("text").inputs == {"items": ["abilities"]}
    assert "model://self" not in (tmp_path / "mine.yaml").read_text()
    assert {"accuracy", "endless", "leaks"} <= {gate.measure for gate in recipe.gates}
    assert "abilities" in recipe.judge.corpora


@pytest.mark.parametrize(
    ("name", "kind", "gates"),
    [
        ("t5", "translate", {"chrf"}),
        ("bert_tokens", "tag", {"tag_accuracy"}),
        ("bert_classes", "classify", {"accuracy", "flips"}),
        ("bert_answers", "question", {"answer_f1", "exact_match"}),
        ("bert_choices", "choices", {"accuracy", "flips"}),
        ("bert_bare", "similarity", {"spearman"}),
        ("llama", "answers", {"accuracy"}),
    ],
)
def test_items_of_ones_own_judge_by_what_the_checkpoint_is_for(name, kind, gates, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "mine.jsonl").write_text("{}")
    model, out = checkpoint(name, tmp_path), tmp_path / "mine.yaml"
    words = [str(model), str(tmp_path / "a.txt"), "-o", str(out), "--items", str(tmp_path / "mine.jsonl")]
    assert main(["init", *words]) == 0
    recipe = load_recipe(out)
    params = recipe.step("items").params
    assert (params["source"], params["task"]) == ((tmp_path / "mine.jsonl").as_uri(), kind)
    # A translator is not held to copying a text, and none of these to what it makes of another one.
    texts = {"llama": ["text", "other", "abilities"], "t5": []}.get(name, ["text"])
    assert list(recipe.judge.corpora) == [*texts, "items"]
    assert ("other" in {step.name for step in recipe.steps}) == (name == "llama")
    out.unlink()
    capsys.readouterr()
    assert main(["init", *words[:-2]]) == 0
    assert ("`--items` judges by items of your own" in capsys.readouterr().out) == (name != "llama")
    assert all(gate.measure != "perplexity" for gate in load_recipe(out).gates) or name == "llama"
    assert {gate.measure for gate in recipe.gates if gate.corpus == "items"} == gates | {"leaks"}
    assert "items" in recipe.step("text").inputs["items"]
    assert all(step.inputs.get("text") != "items" for step in recipe.steps)


def test_labels_that_begin_and_go_on_are_held_as_entities(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    model = checkpoint("bert_tokens", tmp_path)
    config = model / "config.json"
    labels = {"id2label": dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))}
    config.write_text(json.dumps(json.loads(config.read_text()) | labels))
    (tmp_path / "a.csv").write_text("prompt,labels")
    words = [str(model), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml"), "--items", str(tmp_path / "a.csv")]
    assert main(["init", *words]) == 0
    gates = {gate.measure for gate in load_recipe(tmp_path / "mine.yaml").gates if gate.corpus == "items"}
    assert gates == {"tag_accuracy", "entity_f1", "leaks"}


@pytest.mark.parametrize(
    ("name", "row", "gates"),
    [
        ("llama", {"task": "translate", "prompt": "a", "answers": "b"}, {"chrf"}),
        ("llama", {"task": "instructions", "prompt": "a", "checks": []}, {"accuracy"}),
        ("t5", {"task": "summarize", "prompt": "a", "answers": "b"}, {"rougel"}),
        ("bert_bare", {"task": "retrieval", "prompt": "a", "other": "b"}, {"accuracy", "flips"}),
    ],
)
def test_items_that_name_their_task_are_held_to_what_that_measures(name, row, gates, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    words = [str(checkpoint(name, tmp_path)), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]
    assert main(["init", *words, "--items", str(tmp_path / "a.jsonl")]) == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.step("items").params["task"] == row["task"]
    assert {gate.measure for gate in recipe.gates if gate.corpus == "items"} == gates | {"leaks"}


def test_items_that_the_checkpoint_is_not_for_are_refused_before_any_work(store, tmp_path):
    (tmp_path / "a.txt").write_text("words " * 40)
    (tmp_path / "a.jsonl").write_text(json.dumps({"task": "tag", "prompt": "a b", "labels": ["O", "O"]}))
    words = [str(checkpoint("llama", tmp_path)), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]
    assert main(["init", *words, "--items", str(tmp_path / "a.jsonl")]) == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    planned = resolve(expanded(recipe).steps, store, lambda _: Silent())
    with pytest.raises(StageError, match=r"the items ask what the model is not for.*the items are of tag"):
        refuse_inadmissible(planned, recipe, store, print)


def test_checkpoint_that_cannot_be_judged_is_refused_and_leaves_no_recipe(tmp_path, capsys):
    model = checkpoint("bert_bare", tmp_path)
    (model / "modules.json").write_text(
        json.dumps([{"path": "", "type": "Transformer"}, {"path": "1", "type": "LSTM"}])
    )
    (tmp_path / "a.txt").write_text("words")
    assert main(["init", str(model), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]) == 1
    assert "go through a module that is not applied here; measured LSTM" in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def test_items_for_a_model_that_is_put_none_are_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("words")
    words = [str(checkpoint("bert_masked", tmp_path)), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]
    assert main(["init", *words, "--items", str(tmp_path / "a.txt")]) == 1
    assert "items are put to no model of this task; measured its task is fill" in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def initial(root: Path, out: Path | str, *more: str, text: str = "a.txt") -> int:
    if text == "a.txt":
        (root / text).write_text("words")
    return main(["init", str(root / "model"), str(root / text), "-o", str(out), *more])


@pytest.fixture
def model(tmp_path) -> Path:
    return checkpoint("bert_answers", tmp_path).rename(tmp_path / "model")


def test_file_that_cannot_be_written_is_named_and_is_no_defect(model, tmp_path, capsys):
    (tmp_path / "afile").write_text("")
    for out, why in (
        (tmp_path / "afile" / "x.yaml", ("File exists", "Not a directory")),
        (Path("/proc/x.yaml"), ("No such file or directory", "Permission denied")),
        (tmp_path / ("long" * 100), ("File name too long",)),
    ):
        assert initial(tmp_path, out) == 1
        said = capsys.readouterr().err
        assert f"{out} cannot be written; measured " in said and any(one in said for one in why), said
        assert "Name another file with -o." in said and "defect" not in said


def test_next_command_can_be_pasted_whatever_the_file_is_called(model, tmp_path, capsys):
    out = tmp_path / "Mein Ordner" / "it's é.yaml"
    assert initial(tmp_path, out) == 0
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("next: "))
    planned, run = line.removeprefix("next: ").split(", then ")
    assert shlex.split(planned) == ["enginery", "plan", str(out)] and shlex.split(run) == ["enginery", "run", str(out)]


def test_checkpoint_of_a_long_name_is_called_by_its_beginning(model, tmp_path):
    long = model.rename(tmp_path / ("a" * 99 + "." + "b" * 50))
    (tmp_path / "a.txt").write_text("words")
    assert main(["init", str(long), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]) == 0
    assert load_recipe(tmp_path / "mine.yaml").name == "a" * 99


def test_recipe_that_is_refused_is_not_left(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "wrong.yaml").write_text("recipe: 1\nname: {{ name }}\nsteps: []\n")
    monkeypatch.setattr("flows.commands.init.TEMPLATE", tmp_path / "wrong.yaml")
    for _ in range(2):
        assert initial(tmp_path, tmp_path / "mine.yaml") == 1
        assert "steps" in capsys.readouterr().err and not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize("text", ["book.pdf", "empty"])
def test_text_that_no_corpus_reads_is_refused(text, tmp_path, capsys, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    assert initial(tmp_path, tmp_path / "mine.yaml", text=text) == 1
    said = capsys.readouterr().err
    assert text in said and ".parquet" in said and not (tmp_path / "mine.yaml").exists()


def test_items_that_no_set_reads_are_refused(tmp_path, capsys, model):
    (tmp_path / "items.txt").write_text("a question")
    assert initial(tmp_path, tmp_path / "mine.yaml", "--items", str(tmp_path / "items.txt")) == 1
    assert "holds no items" in capsys.readouterr().err and not (tmp_path / "mine.yaml").exists()
    (tmp_path / "items.jsonl").write_text("no JSON")
    assert initial(tmp_path, tmp_path / "mine.yaml", "--items", str(tmp_path / "items.jsonl")) == 1
    assert "items.jsonl" in capsys.readouterr().err and not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"prompt": "a", "answers": ["b"], "context": "c"}, {}, ""),
        ({"question": "a", "answer": "b", "context": "c"}, {"prompt": "question", "answers": "answer"}, "is taken for"),
        (
            {"question": "a", "input": "a", "answers": ["b"]},
            {},
            "no column for `prompt`, it has question, input, answers",
        ),
        ({"q": "a", "answer": "b"}, {"answers": "answer"}, "no column for `prompt`, it has q, answer"),
        ({"q": "a", "task": "answers"}, {}, ""),
        # As SQuAD has them.
        (
            {"question": "a", "answers": {"text": ["b"], "answer_start": [0]}, "context": "c"},
            {"prompt": "question", "answers": "answers.text"},
            "is taken for",
        ),
        ({"prompt": "a", "answers": {"en": "b"}}, {}, "no column for `answers`, it has prompt, answers.en"),
    ],
)
def test_columns_of_items_by_other_names_are_written_or_asked_for(row, columns, said, tmp_path, capsys, model):
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps(row) + "\n")
    assert initial(tmp_path, tmp_path / "mine.yaml", "--items", str(items)) == 0
    assert load_recipe(tmp_path / "mine.yaml").step("items").params.get("columns", {}) == columns
    told = capsys.readouterr().out
    assert said in told and ("your items" in told) == bool(said)


@pytest.mark.parametrize(
    ("name", "row", "columns"),
    [
        ("bert_classes", {"text": "a", "label": "b", "id": "1"}, {"prompt": "text", "answers": "label"}),
        ("bert_classes", {"sentence": "a", "sentiment": 1}, {"prompt": "sentence", "answers": "sentiment"}),
        (
            "bert_classes",
            {"sentence1": "a", "sentence2": "b", "label": 1},
            {"prompt": "sentence1", "context": "sentence2", "answers": "label"},
        ),
        (
            "bert_classes",
            {"premise": "a", "hypothesis": "b", "label": 1},
            {"prompt": "premise", "context": "hypothesis", "answers": "label"},
        ),
        # Without it the model would be judged by half of what it is to read.
        (
            "bert_classes",
            {"prompt": "a", "text_pair": "b", "answers": ["c"]},
            {"context": "text_pair"},
        ),
        ("t5", {"source": "a", "target": "b"}, {"prompt": "source", "answers": "target"}),
        ("bert_tokens", {"tokens": ["a"], "ner_tags": [1]}, {"words": "tokens", "labels": "ner_tags"}),
        ("bert_bare", {"sentence1": "a", "sentence2": "b", "score": 1}, {"prompt": "sentence1", "other": "sentence2"}),
    ],
)
def test_columns_that_data_sets_of_a_task_have_are_known(name, row, columns, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "items.jsonl").write_text(json.dumps(row) + "\n")
    words = [str(checkpoint(name, tmp_path)), str(tmp_path / "a.txt"), "-o", str(tmp_path / "mine.yaml")]
    assert main(["init", *words, "--items", str(tmp_path / "items.jsonl")]) == 0
    assert load_recipe(tmp_path / "mine.yaml").step("items").params["columns"] == columns
