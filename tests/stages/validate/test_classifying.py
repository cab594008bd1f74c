"""Items put to classifiers, held against what transformers answers to each alone."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.stages.models.families import family
from tests.stages.validate.test_questions import asked

WORDS = ("abc", "b a c d", "d d", "a b c d e f", "f e d", "c")


def tokens(folder, text):
    given = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=64)
    return {"input_ids": given["input_ids"]}


def theirs(folder, text):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.softmax(model(**tokens(folder, text)).logits[0].double(), -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family("bert_classes", tmp_path_factory.mktemp("classes"))


def items(labels, words=WORDS):
    return [
        Item(id=str(n), ability="x", task="classify", prompt=text, answers=(labels[n % len(labels)],))
        for n, text in enumerate(words)
    ]


def test_class_is_the_likeliest_one_and_right_where_it_is_the_items(folder, tmp_path):
    labels = [f"LABEL_{n}" for n in range(3)]
    report = asked(tmp_path, folder, items(labels), baseline=folder)
    for one, text in zip(report["documents"], WORDS, strict=True):
        shares = theirs(folder, text)
        assert one["answer"] == labels[int(shares.argmax())]
        assert one["confidence"] == pytest.approx(float(shares.max()), abs=1e-5)
        assert one["right"] == (one["answer"] == one["expected"])
        assert (one["chance"], one["kl"]) == (pytest.approx(1 / 3), 0)
    assert {"accuracy", "precision", "recall", "f1", "calibration_error", "kl_divergence"} <= report["measures"].keys()
    assert report["task"] == "classify" and "perplexity" not in report["measures"]


def test_label_may_be_a_number_and_an_unknown_one_is_refused(folder, tmp_path):
    by_name = asked(tmp_path, folder, items(["LABEL_0", "LABEL_2"]))["documents"]
    by_number = asked(tmp_path, folder, items(["0", "2"]))["documents"]
    assert [one["right"] for one in by_name] == [one["right"] for one in by_number]
    assert [one["expected"] for one in by_number[:2]] == ["LABEL_0", "LABEL_2"]
    for wrong in ("3", "positive"):
        with pytest.raises(StageError, match="item 0 is of a class that the model does not know"):
            asked(tmp_path, folder, items([wrong]))


def test_text_that_is_longer_than_the_model_reads_is_read_from_its_beginning(folder, tmp_path):
    long = "a b c " * 60
    (one,) = asked(tmp_path, folder, items(["LABEL_1"], [long]))["documents"]
    assert one["tokens"] == 64
    assert one["confidence"] == pytest.approx(float(theirs(folder, long).max()), abs=1e-5)


def test_items_of_another_kind_are_refused_of_a_classifier(folder, tmp_path):
    with pytest.raises(StageError, match="ask what the model is not for"):
        asked(tmp_path, folder, [Item(id="a", ability="a", prompt="a", answers=("b",))])


def test_decoder_that_classifies_reads_each_text_to_its_own_end(tiny, tmp_path):
    """It looks for the last token of a text, so that padding beside it would be read as one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=768, num_labels=3, pad_token_id=5))
    folder = tmp_path / "decoder"
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    texts = ["The import statement", "a", "If the object is not a class then it is", "None"]
    report = asked(tmp_path, folder, items(["LABEL_0"], texts))
    for one, text in zip(report["documents"], texts, strict=True):
        assert one["confidence"] == pytest.approx(float(theirs(folder, text).max()), abs=1e-5)


def test_classes_that_exclude_no_other_are_compared_each_by_itself(folder, tmp_path):
    said = {}
    for name, added in (("dense", 0.0), ("more", 2.0)):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        model.config.problem_type = "multi_label_classification"
        with torch.no_grad():
            model.classifier.bias.add_(added)
        shutil.copytree(folder, tmp_path / name)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            said[name] = [torch.sigmoid(model.eval()(**tokens(folder, text)).logits[0].double()) for text in WORDS]
    report = asked(tmp_path, tmp_path / "more", items(["LABEL_0"]), baseline=tmp_path / "dense")
    for one, dense_C, more_C in zip(report["documents"], said["dense"], said["more"], strict=True):
        assert one["confidence"] == pytest.approx(float(more_C.max()), abs=1e-5)
        apart = dense_C * (dense_C / more_C).log() + (1 - dense_C) * ((1 - dense_C) / (1 - more_C)).log()
        assert one["kl"] / one["tokens"] == pytest.approx(float(apart.sum()), rel=1e-3)
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(WORDS * 20)]
    (tmp_path / "text" / "test.jsonl").write_text("".join(rows))
    found = {}
    for name in said:
        inputs = {"model": tmp_path / name, "text": tmp_path / "text", "baseline": tmp_path / "dense"}
        (tmp_path / f"{name}-text").mkdir()
        VALIDATE.run(ValidateParams(window_tokens=16, windows=4), inputs, tmp_path / f"{name}-text", Silent())
        found[name] = json.loads((tmp_path / f"{name}-text" / "report.json").read_text())["measures"]["kl_divergence"]
    assert found["dense"] == 0 and found["more"] > 0.1
