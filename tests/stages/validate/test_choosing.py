"""Items with choices put to models that choose, held against what transformers says of all choices at once."""

import pytest
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from stages.measures.items import Item
from stages.runtime.contract import StageError
from tests.stages.validate.test_questions import asked
from tests.stages.validate.words import model

ASKED = [("who is small ?", [" a cat", " the big dog", " rome"]), ("it sat", [" on a mat .", " in paris"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model("bert_choices", tmp_path_factory.mktemp("choices"))


def items():
    return [
        Item(id=str(n), ability="x", task="choices", prompt=prompt, choices=tuple(choices), right=1)
        for n, (prompt, choices) in enumerate(ASKED)
    ]


def test_choice_is_the_one_that_the_model_scores_highest(folder, tmp_path):
    report = asked(tmp_path, folder, items(), baseline=folder)
    chooser = AutoModelForMultipleChoice.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for one, (prompt, choices) in zip(report["documents"], ASKED, strict=True):
        given = tokenizer([prompt] * len(choices), choices, return_tensors="pt", padding=True)
        with torch.no_grad():
            best = int(chooser(**{key: rows[None] for key, rows in given.items()}).logits[0].argmax())
        assert one["answer"] == choices[best]
        assert (one["right"], one["expected"]) == (int(best == 1), choices[1])
        assert (one["chance"], one["kl"]) == (1 / len(choices), 0)
    assert report["task"] == "choose"
    assert report["measures"]["accuracy"] == sum(one["right"] for one in report["documents"]) / len(ASKED)


def test_other_items_are_refused_and_choices_are_put_to_no_classifier(folder, tmp_path):
    with pytest.raises(StageError, match="ask what the model is not for"):
        asked(tmp_path, folder, [Item(id="a", ability="a", prompt="a", answers=("b",))])
    with pytest.raises(StageError, match="ask what the model is not for"):
        asked(tmp_path, model("bert_classes", tmp_path / "models"), items())
