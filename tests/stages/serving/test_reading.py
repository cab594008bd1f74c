"""Vectors, classes, entities and answers, held against numpy and transformers' own pipelines."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizerFast,
)

from stages.compile.stage import COMPILE
from stages.export.stage import EXPORT
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from stages.serving.found import Entity
from stages.serving.reading import LONGEST_TOKENS, answer, best_span, choose, classify, embed, tag
from tests.stages.models.families import family

LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", "##a", "##b"]
TEXTS = ["a b c", "f", "d d a e f c b a a b d e", "e  fab b"]


def checkpoint(name, root, **config):
    folder = family(name, root)
    BertTokenizerFast({one: at for at, one in enumerate(LETTERS)}).save_pretrained(folder)
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(read | config))
    return folder


def compiled(folder, root):
    graph, engine = root / "graph", root / "engine"
    for stage, inputs, params, out in (
        (EXPORT, {"model": folder}, {}, graph),
        (COMPILE, {"graph": graph}, {"backend": "onnxruntime"}, engine),
    ):
        out.mkdir(parents=True)
        stage.run(stage.params.model_validate(params), inputs, out, Silent())
    return engine


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("reading")


@pytest.fixture(scope="module")
def classes(root):
    folder = checkpoint("bert_classes", root, id2label={"0": "bad", "1": "fair", "2": "good"})
    return folder, open_engine(compiled(folder, root / "classes"))


def encoded(folder, *texts):
    return BertTokenizerFast.from_pretrained(folder)(*texts, return_tensors="pt")


@torch.no_grad()
def theirs(folder, kind, *texts):
    return kind.from_pretrained(folder, dtype=torch.float32).eval()(**encoded(folder, *texts))


def test_texts_and_pairs_are_classified_as_by_transformers_each_as_if_alone(classes):
    folder, engine = classes
    pairs = [*TEXTS, ("a b", "c d e f")]
    for model in (engine, open_engine(folder)):
        for text, said in zip(pairs, classify(model, pairs), strict=True):
            given = (text,) if isinstance(text, str) else text
            logits = theirs(folder, AutoModelForSequenceClassification, *given).logits[0]
            wanted = dict(zip(("bad", "fair", "good"), logits.softmax(-1).tolist(), strict=True))
            assert {one.label: one.score for one in said} == pytest.approx(wanted, abs=1e-5)
            assert said[0].label == max(wanted, key=wanted.get)


def test_classes_that_exclude_no_other_have_probabilities_of_their_own(classes):
    folder, engine = classes
    engine.config["problem_type"] = "multi_label_classification"
    try:
        (said,) = classify(engine, ["a b c"])
    finally:
        del engine.config["problem_type"]
    wanted = theirs(folder, AutoModelForSequenceClassification, "a b c").logits[0].sigmoid().tolist()
    assert sorted(one.score for one in said) == pytest.approx(sorted(wanted), abs=1e-5)


def test_entities_are_joined_by_the_rules_of_their_labels(root):
    """A head that says of each letter what its row of the table says."""
    labels = {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC", "4": "I-LOC"}
    folder = checkpoint("bert_tokens", root, id2label=labels)
    model = open_engine(folder)
    said = {"a": 1, "b": 2, "c": 0, "d": 3, "e": 4, "f": 1, "##a": 3, "##b": 0}

    def forward(ids_NT, mask_NT, _segments):
        places = [[said.get(LETTERS[one], 3) for one in row] for row in ids_NT]
        return np.float32(8) * np.eye(5, dtype=np.float32)[np.array(places)]

    read = type(model)(**{**vars(model), "forward": forward})
    text = "a b  c dab e a f b b c e b"
    (found,) = tag(read, [text])
    assert [(one.label, one.start, one.end) for one in found] == [
        ("PER", 0, 3), ("LOC", 7, 12), ("PER", 13, 14), ("PER", 15, 20), ("LOC", 23, 24), ("PER", 25, 26)
    ]  # fmt: skip
    assert all(one.text == text[one.start : one.end] for one in found)
    assert found[0].score == pytest.approx(np.exp(8) / (np.exp(8) + 4))
    tagged = tag(model, TEXTS)
    for given, one in zip(TEXTS, tagged, strict=True):
        best = theirs(folder, AutoModelForTokenClassification, given).logits[0].argmax(-1)[1:-1].tolist()
        words = [at for at, own in enumerate(encoded(folder, given).word_ids()[1:-1]) if LETTERS.index("##a") > own]
        assert bool(one) == any(labels[str(best[at])] != "O" for at in words)
        assert all(isinstance(entity, Entity) and entity.text == given[entity.start : entity.end] for entity in one)


@pytest.fixture(scope="module")
def reader(root):
    folder = checkpoint("bert_answers", root)
    return folder, compiled(folder, root / "answers")


def test_question_and_context_are_told_apart_as_by_transformers(reader):
    """Logits of a pair beside a shorter one, by graph, engine and checkpoint."""
    folder, made = reader
    pairs = [("a b", "c d  e f a b"), ("f", "d e")]
    rows = [encoded(folder, *pair) for pair in pairs]
    wanted = [theirs(folder, AutoModelForQuestionAnswering, *pair) for pair in pairs]
    ids, types, mask = (np.zeros((2, rows[0]["input_ids"].shape[1]), np.int64) for _ in range(3))
    for place, row in enumerate(rows):
        at = slice(0, row["input_ids"].shape[1])
        ids[place, at], types[place, at], mask[place, at] = row["input_ids"], row["token_type_ids"], 1
    assert types.max() == 1
    described = json.loads((made / "engine.json").read_text())["components"]["model"]
    assert described["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    for model in (open_engine(made), open_engine(made.with_name("graph")), open_engine(folder)):
        assert model.tells_segments
        found, plain = model.forward(ids, mask, types), model.forward(ids, mask)
        for said, row, out in zip(found, mask.sum(1), wanted, strict=True):
            right = torch.cat([out.start_logits, out.end_logits]).numpy()
            np.testing.assert_allclose(said[:, :row], right, atol=1e-4)
        assert np.abs(plain - found)[:, :, : mask.sum(1).min()].max() > 0.05  # one segment is another question
        np.testing.assert_allclose(model.logits(ids[:1], types[:1]), found[:1], atol=1e-4)


def test_answer_is_the_likeliest_span_by_brute_force(reader):
    folder, engine = reader[0], open_engine(reader[1])
    question, context = "a b", "c d  e f a b c d e f f e d c"
    said = answer(engine, question, context)
    out, row = theirs(folder, AutoModelForQuestionAnswering, question, context), encoded(folder, question, context)
    inside = [at for at, whose in enumerate(row.sequence_ids()) if whose == 1]
    starts, stops = out.start_logits[0].double(), out.end_logits[0].double()
    scores = {(a, b): float(starts[a] + stops[b]) for a in inside for b in inside if 0 <= b - a < LONGEST_TOKENS}
    first, last = max(scores, key=scores.get)
    offsets = row.encodings[0].offsets
    assert (said.start, said.end) == (offsets[first][0], offsets[last][1])
    assert said.text == context[said.start : said.end]
    places = [0, *inside]
    wanted = starts[places].softmax(0)[places.index(first)] * stops[places].softmax(0)[places.index(last)]
    assert said.score == pytest.approx(float(wanted), abs=1e-5)
    long = " ".join("abcdef"[at * 7 % 6] for at in range(150))  # more than the 64 tokens that the model reads
    found = answer(engine, question, long)
    assert found.text and found.text == long[found.start : found.end]
    none = answer(engine, question, context, unanswerable=True)
    silent = float(starts[0] + stops[0]) > scores[first, last]
    assert (none.text == "") == silent and (silent or none == said)
    with pytest.raises(StageError, match="the question leaves no room for its context; measured 70 tokens; limit 60"):
        answer(engine, "a " * 70, context)


CHOICES = ["c d e f a b", "d", "f f"]


@pytest.mark.parametrize("name", ["bert_choices", "roberta_choices", "distilbert_choices", "electra_choices",
                                  "albert_choices", "deberta_choices"])  # fmt: skip
def test_choices_are_weighed_as_by_transformers(name, root):
    """By graph, engine and checkpoint; segments are told where the model has some."""
    folder = checkpoint(name, root)
    told_apart = json.loads((folder / "config.json").read_text()).get("type_vocab_size", 0) > 1
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    given = tokenizer(["a b"] * len(CHOICES), CHOICES, return_tensors="pt", padding=True)
    if not told_apart:
        del given["token_type_ids"]
    model = AutoModelForMultipleChoice.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(**{key: one[None] for key, one in given.items()}).logits[0].softmax(-1).tolist()
    made = compiled(folder, root / f"{name}-made")
    for opened in (open_engine(made), open_engine(made.with_name("graph")), open_engine(folder)):
        assert (opened.task, opened.tells_segments) == ("choose", told_apart)
        said = choose(opened, "a b", CHOICES)
        assert [one.score for one in sorted(said, key=lambda one: one.choice)] == pytest.approx(wanted, abs=1e-5)
        assert said[0].choice == max(range(3), key=wanted.__getitem__) and said[0].text == CHOICES[said[0].choice]
    for choices, text in ([], "nothing is asked"), (["a", ""], "a text is empty"), (["a b " * 40], "a text is longer"):
        with pytest.raises(StageError, match=text):
            choose(opened, "a", choices)
    with pytest.raises(StageError, match="the model is not for this: classify or score; measured its task is choose"):
        classify(opened, ["a"])


def test_span_is_no_longer_than_allowed_and_the_first_of_equal_ones():
    assert best_span(np.array([5.0, 0, 0, 0]), np.array([0, 0, 0, 5.0]), 2)[1:] == (0, 0)
    assert best_span(np.array([5.0, 0, 0, 0]), np.array([0, 0, 0, 5.0]), 4) == (10.0, 0, 3)


def test_vectors_of_a_model_without_modules_are_means_and_of_texts_alone(root):
    folder = checkpoint("bert_bare", root)
    model = open_engine(folder)
    found = embed(model, TEXTS)
    alone = [model.logits(np.array([model.tokenizer.encode(one).ids]))[0].mean(0) for one in TEXTS]
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    long = "a b " * 40
    with pytest.raises(StageError, match="a text is longer than the model reads; measured 82 tokens; limit 64 tokens"):
        embed(model, [long])
    cut = BertTokenizerFast.from_pretrained(folder)(long, truncation=True, max_length=64)["input_ids"]
    wanted = model.logits(np.array([cut]))[0].mean(0)
    np.testing.assert_allclose(embed(model, [long], truncate=True)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "nothing is asked; measured no text; limit at least one"),
        ([""], "a text is empty; measured ''; limit at least one character"),
        (["a", " \n"], "a text is empty"),
        (["a", 3], "a text is no text; measured 3"),
        (["a \udcff"], r"a text is no text; measured '\\udcff' at character 2; limit what UTF-8 can write"),
        (["a b " * 40], "a text is longer than the model reads; measured 82 tokens; limit 64 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(classes, texts, said):
    with pytest.raises(StageError, match=said):
        classify(classes[1], texts)
    with pytest.raises(StageError, match="the model is not for this: embed; measured its task is classify"):
        embed(classes[1], ["a"])
