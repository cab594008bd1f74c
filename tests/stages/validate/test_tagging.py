"""Items put to token classifiers, held against what transformers answers to each alone, and against seqeval."""

import json

import pytest
import torch
from seqeval import metrics
from transformers import AutoModelForTokenClassification, AutoTokenizer

from stages.measures.items import Item
from stages.runtime.contract import StageError
from tests.stages.validate.test_questions import asked
from tests.stages.validate.words import model

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SENTENCES = ("the cats sat on a mat", "dog , who was big", "romans sat smally in paris", "where is it ?", "a cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = model("bert_tokens", tmp_path_factory.mktemp("tags"))
    config = json.loads((made / "config.json").read_text())
    config |= {"id2label": dict(enumerate(LABELS)), "label2id": {one: at for at, one in enumerate(LABELS)}}
    (made / "config.json").write_text(json.dumps(config))
    return made


def theirs(folder, words):
    """Each word's label, by transformers' own way to tokenize words and the first token of each."""
    tagger = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    given = AutoTokenizer.from_pretrained(folder)(list(words), is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        best = tagger(input_ids=given["input_ids"]).logits[0].argmax(-1).tolist()
    first = {}
    for token, word in enumerate(given.word_ids()):
        first.setdefault(word, token)
    return [LABELS[best[first[word]]] for word in range(len(words))]


def item(number, words, labels, **given):
    return Item(id=str(number), ability="news", task="tag", prompt=" ".join(words), labels=tuple(labels), **given)


def test_each_word_is_given_the_label_of_its_first_token(folder, tmp_path):
    split = [one.split() for one in SENTENCES]
    found = [theirs(folder, words) for words in split]
    assert len({label for labels in found for label in labels}) > 2
    true = [[label if place % 3 else "B-LOC" for place, label in enumerate(labels)] for labels in found]
    report = asked(
        tmp_path, folder, [item(n, *one) for n, one in enumerate(zip(split, true, strict=True))], baseline=folder
    )
    for one, labels, expected in zip(report["documents"], found, true, strict=True):
        assert (one["answer"].split(), one["expected"].split()) == (labels, expected)
        assert (one["right"], one["kl"], one["chance"]) == (labels == expected, 0, 0)
    measures = report["measures"]
    assert measures["entity_f1"] == pytest.approx(metrics.f1_score(true, found))
    assert measures["entity_precision"] == pytest.approx(metrics.precision_score(true, found))
    assert measures["entity_recall"] == pytest.approx(metrics.recall_score(true, found))
    assert measures["tag_accuracy"] == pytest.approx(metrics.accuracy_score(true, found))
    assert 0 < measures["entity_f1"] < 1 and report["task"] == "tag"
    assert report["slices"]["news"]["entity_f1"] == measures["entity_f1"]


def test_chinese_is_labelled_by_characters(folder, tmp_path):
    text = "2024年北京天气很好"
    found = theirs(folder, text)
    given = Item(id="a", ability="x", language="zh", task="tag", prompt=text, labels=tuple(found))
    (one,) = asked(tmp_path, folder, [given])["documents"]
    assert one["answer"].split() == found and one["right"] == 1


def test_words_that_are_given_stand_for_the_prompts(folder, tmp_path):
    words = ("the", "small cat", "sat")
    given = Item(id="a", ability="x", task="tag", prompt="shown", words=words, labels=("O", "O", "O"))
    (one,) = asked(tmp_path, folder, [given])["documents"]
    by_hand = theirs(folder, "the small cat sat".split())
    assert one["answer"].split() == [by_hand[0], by_hand[1], by_hand[3]]


def test_word_of_which_no_token_is_left_is_outside(folder, tmp_path):
    given = Item(id="a", ability="x", task="tag", prompt="x", words=("cat", "\u0000", "dog"), labels=("O", "O", "O"))
    (one,) = asked(tmp_path, folder, [given])["documents"]
    by_hand = theirs(folder, ["cat", "dog"])
    assert one["answer"].split() == [by_hand[0], "O", by_hand[1]]


def test_label_may_be_a_number_and_an_unknown_one_is_refused(folder, tmp_path):
    words = "the cat".split()
    (one,) = asked(tmp_path, folder, [item(0, words, ["1", "0"])])["documents"]
    assert one["expected"] == "B-PER O"
    with pytest.raises(StageError, match="item 7 calls 'cat' what the model does not know") as caught:
        asked(tmp_path, folder, [item(7, words, ["O", "B-ORG"])])
    assert "'B-ORG'" in str(caught.value) and "B-PER" in str(caught.value)


def test_parts_of_speech_have_right_tags_and_no_entities(tmp_path):
    folder = model("bert_tokens", tmp_path)
    measures = asked(tmp_path, folder, [item(0, ["the", "cat"], ["LABEL_0", "LABEL_1"])])["measures"]
    assert "tag_accuracy" in measures and "entity_f1" not in measures


def test_labels_that_are_not_one_a_word_are_refused():
    with pytest.raises(ValueError, match="item 0 has 2 words and 3 labels"):
        item(0, ["the", "cat"], ["O", "O", "O"])
    with pytest.raises(ValueError, match="0 labels"):
        item(0, ["the", "cat"], [])


def test_sentence_that_is_longer_than_the_model_reads_is_left_out(folder, tmp_path):
    long = item(1, ["cat"] * 70, ["O"] * 70)
    assert asked(tmp_path, folder, [item(0, ["cat"], ["O"]), long])["left_out"] == ["1"]
