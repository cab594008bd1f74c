"""Items put to classifiers, held against what transformers answers to each alone."""

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
from tests.stages.models.families import family
from tests.stages.validate.test_questions import asked

WORDS = ("abc", "b a c d", "d d", "a b c d e f", "f e d", "c")


def theirs(folder, text):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=64)["input_ids"]
    with torch.no_grad():
        return torch.softmax(model(input_ids=ids).logits[0].double(), -1)


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
