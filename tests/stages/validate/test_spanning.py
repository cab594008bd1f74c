"""Questions put to models that find answers in a context, held against a brute force over transformers' own logits."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.stages.validate.test_questions import asked, folder_of
from tests.stages.validate.words import model

CONTEXT = "the cats sat on a mat . a big dog was in rome , where it sat in paris . who is small ?"
LONG = " ".join([CONTEXT, "it was a small cat in rome , on the big mat .", CONTEXT.replace("cats", "dogs")] * 2)
ZH = "今天北京天气很好。北京是中国的首都，2024年公园很好。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model("bert_answers", tmp_path_factory.mktemp("spans"))


def theirs(folder, question, context, *, longest=30, silent=False):
    """The text of the best span over all windows, each span tried."""
    found = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked_ids = tokenizer(question)["input_ids"]
    plain = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    ids, where, end = plain["input_ids"], plain["offset_mapping"], tokenizer.sep_token_id
    room = 64 - len(asked_ids) - 1
    starts = [0]
    while starts[-1] + room < len(ids):
        starts.append(starts[-1] + room - min(128, room // 2))
    best, nothing = (float("-inf"), ""), []
    for start in starts:
        part = ids[start : start + room]
        with torch.no_grad():
            segments = torch.tensor([[0] * len(asked_ids) + [1] * (len(part) + 1)])
            out = found(input_ids=torch.tensor([[*asked_ids, *part, end]]), token_type_ids=segments)
        first, last = out.start_logits[0].double().tolist(), out.end_logits[0].double().tolist()
        nothing.append(first[0] + last[0])
        for a, b in itertools.product(range(len(part)), repeat=2):
            if a <= b < a + longest:
                score = first[len(asked_ids) + a] + last[len(asked_ids) + b]
                if score > best[0] + 1e-6:
                    best = score, context[where[start + a][0] : where[start + b][1]]
    return "" if silent and min(nothing) > best[0] else best[1], len(starts)


def item(number, question, context, answers, **given):
    return Item(
        id=str(number), ability="wiki", task="question", prompt=question, context=context, answers=answers, **given
    )


def test_answer_is_the_best_span_of_all_windows(folder, tmp_path):
    questions = ("where is the cat ?", "who sat on a mat", "is it big", "was the dog in paris or rome ?")
    wanted = [theirs(folder, question, context) for question in questions for context in (CONTEXT, LONG)]
    assert {windows for _, windows in wanted} >= {1, 2} or max(windows for _, windows in wanted) > 3
    assert len({text for text, _ in wanted}) > 2
    pairs = itertools.product(questions, (CONTEXT, LONG))
    items = [item(n, *pair, (wanted[n][0],) if n % 2 else ("zanzibar",)) for n, pair in enumerate(pairs)]
    report = asked(tmp_path, folder, items, baseline=folder)
    for number, (one, (text, windows)) in enumerate(zip(report["documents"], wanted, strict=True)):
        assert one["answer"] == text
        assert (one["right"], one["exact"], one["overlap"]) == ((1, 1, 1) if number % 2 else (0, 0, 0))
        assert (one["tokens"], one["kl"]) == (2 * windows, 0)
    assert report["measures"]["exact_match"] == report["measures"]["answer_f1"] == 0.5
    assert report["measures"]["accuracy"] == 0.5 and report["task"] == "answer"


def test_nothing_is_said_only_where_some_question_has_no_answer(tmp_path):
    """Over some drawn models, of which some would rather say nothing."""
    said = set()
    for draw in range(4):
        folder = model("bert_answers", tmp_path / "models", draw=draw)
        questions = ("where is it", "who")
        items = [item(n, one, CONTEXT, () if n else ("cats",)) for n, one in enumerate(questions)]
        documents = asked(tmp_path, folder, items)["documents"]
        for one, question in zip(documents, questions, strict=True):
            assert one["answer"] == theirs(folder, question, CONTEXT, silent=True)[0]
            said.add(bool(one["answer"]))
        assert documents[1]["right"] == (documents[1]["answer"] == "")
        assert all(one["answer"] for one in asked(tmp_path, folder, items[:1])["documents"])
    assert said == {True, False}


def test_some_of_the_items_are_asked_as_all_of_them(tmp_path):
    """The first ones of a set have answers; whether nothing may be said is a matter of the whole set."""
    for draw in range(4):
        folder = model("bert_answers", tmp_path / "models", draw=draw)
        items = [
            item(n, one, CONTEXT, ("cats",) if n < 2 else ()) for n, one in enumerate(("where is it", "who", "is it"))
        ]
        inputs = {"model": folder, "text": folder_of(items, tmp_path / f"items{draw}")}
        said = []
        for most in (None, 2):
            output = tmp_path / f"out-{draw}-{most}"
            output.mkdir()
            VALIDATE.run(ValidateParams(items=most), inputs, output, Silent())
            said.append(json.loads((output / "report.json").read_text())["documents"][:2])
        assert said[0] == said[1]


def test_chinese_answer_is_found_and_scored_by_characters(folder, tmp_path):
    text, _ = theirs(folder, "北京是", ZH, longest=50)
    near = text[1:] if len(text) > 1 else f"{text}的"
    items = [item(0, "北京是", ZH, (f"《{text}》",), language="zh"), item(1, "北京是", ZH, (near,), language="zh")]
    first, second = asked(tmp_path, folder, items)["documents"]
    assert (first["answer"], first["exact"]) == (text, 1)
    assert second["exact"] == 0 and 0 < second["overlap"] < 1


def test_item_without_a_context_is_refused(folder, tmp_path):
    with pytest.raises(StageError, match="item 3 has no context"):
        asked(tmp_path, folder, [item(3, "where is it", "", ("rome",))])


def test_question_that_leaves_no_room_for_its_context_is_left_out(folder, tmp_path):
    long = item(1, "cat " * 80, CONTEXT, ("mat",))
    assert asked(tmp_path, folder, [item(0, "who", CONTEXT, ("dog",)), long])["left_out"] == ["1"]
