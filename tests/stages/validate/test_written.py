"""Translations and summaries, held against transformers' own greedy generation, sacrebleu and rouge-score."""

import json
import shutil

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.serving.eager import eager
from stages.serving.generate import greedy
from stages.validate.params import ValidateParams, check_asked_of_text
from tests.stages.models.families import family
from tests.stages.validate.test_questions import asked, said, theirs  # noqa: F401  # a fixture
from tests.stages.validate.words import WORDS, lively, model

SOURCES = ("the cat sat", "a dog was in rome", "who is it", "where", "the big dog sat on a small mat in paris .")
REFERENCES = (" ".join(WORDS[:6]), "the dog was in rome", "it is a cat", "in paris", "a small dog sat on the mat")


def item(number, prompt, answers, task="translate", **given):
    return Item(id=str(number), ability="words", task=task, prompt=prompt, answers=answers, **given)


def by_library(folder, text, new, beams=1):
    found = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = found.generate(input_ids=ids, do_sample=False, num_beams=beams, max_new_tokens=new)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def most(folder, reference):
    return 2 * len(AutoTokenizer.from_pretrained(folder)(reference)["input_ids"]) + 16


@pytest.mark.parametrize("name", ["bart", "marian", "t5", "t5_plain"])
def test_translation_is_transformers_own_greedy_one(name, tmp_path):
    folder = lively(name, tmp_path) if name != "marian" else model(name, tmp_path)
    items = [item(n, *pair[:1], pair[1:]) for n, pair in enumerate(zip(SOURCES, REFERENCES, strict=True))]
    report = asked(tmp_path, folder, items, baseline=folder)
    wanted = [
        by_library(folder, *pair) for pair in zip(SOURCES, (most(folder, one) for one in REFERENCES), strict=True)
    ]
    assert [one["answer"] for one in report["documents"]] == wanted
    assert any(wanted)
    measures, streams = report["measures"], [list(REFERENCES)]
    assert measures["bleu"] == pytest.approx(BLEU().corpus_score(wanted, streams).score)
    assert measures["chrf"] == pytest.approx(CHRF().corpus_score(wanted, streams).score)
    assert measures["kl_divergence"] == 0 and report["task"] == "translate"
    assert "accuracy" not in measures and all("right" not in one for one in report["documents"])


def test_translation_is_judged_by_the_beams_that_are_asked_for_or_the_settings(tmp_path):
    folder = shutil.copytree(lively("t5", tmp_path / "made"), tmp_path / "asking")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 3}))
    items = [item(n, *pair[:1], pair[1:]) for n, pair in enumerate(zip(SOURCES, REFERENCES, strict=True))]
    lengths, found = [most(folder, one) for one in REFERENCES], {}
    for beams in (None, 1, 4):
        documents = asked(tmp_path, folder, items, ValidateParams(beams=beams), baseline=folder)["documents"]
        found[beams] = [one["answer"] for one in documents]
        wanted = [by_library(folder, *pair, beams or 3) for pair in zip(SOURCES, lengths, strict=True)]
        assert found[beams] == wanted and {one["kl"] for one in documents} == {0}
    assert found[None] != found[1]


def test_beams_are_refused_of_models_and_texts_that_are_not_judged_by_them(tiny, tmp_path):
    items, params = [Item(id="a", ability="a", prompt="The name", answers=("of",))], ValidateParams(beams=2)
    with pytest.raises(StageError, match=r"beams are followed by models with an encoder.*its task is generate"):
        asked(tmp_path, tiny, items, params)
    with pytest.raises(StageError, match=r"what is asked for is measured of items; measured beams"):
        check_asked_of_text(params)


@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_first_token_is_forced_and_words_are_left_out_as_by_transformers(name, tmp_path):
    folder = shutil.copytree(family(name, tmp_path / "made"), tmp_path / "forced")
    settings = json.loads((folder / "generation_config.json").read_text())
    rows, ends = [[5, 6, 7], [9, 8], [11, 12, 13, 14, 15]], frozenset({settings["eos_token_id"]})
    plain = greedy(eager(folder).steps(), rows, ends=ends, max_new_tokens=9, maximum_tokens=64)
    settings |= {"forced_bos_token_id": 40, "bad_words_ids": [[plain[0][1]], [plain[1][2]]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    found = greedy(eager(folder).steps(), rows, ends=ends, max_new_tokens=9, maximum_tokens=64)
    library = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, one in zip(rows, found, strict=True):
        out = library.generate(input_ids=torch.tensor([row]), do_sample=False, num_beams=1, max_new_tokens=9)
        assert out[0, 1:].tolist() == one
        assert one[0] == 40
    assert found != plain


def test_divergence_is_of_each_token_of_the_reference(tmp_path):
    first, second = (model("bart", tmp_path, draw=draw) for draw in range(2))
    items = [item(n, *pair[:1], pair[1:]) for n, pair in enumerate(zip(SOURCES, REFERENCES, strict=True))]
    documents = asked(tmp_path, first, items, baseline=second)["documents"]
    tokenizer = AutoTokenizer.from_pretrained(first)
    models = [AutoModelForSeq2SeqLM.from_pretrained(one, dtype=torch.float32).eval() for one in (second, first)]
    for one, source, reference in zip(documents, SOURCES, REFERENCES, strict=True):
        labels = tokenizer(reference, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            given = {"input_ids": tokenizer(source, return_tensors="pt")["input_ids"], "labels": labels}
            p, q = (log_softmax(made(**given).logits[0].double().numpy(), axis=-1) for made in models)
        assert one["kl"] == pytest.approx(
            rel_entr(torch.tensor(p).exp().numpy(), torch.tensor(q).exp().numpy()).sum(), rel=1e-3
        )
        assert one["tokens"] == labels.shape[1]


def test_summary_is_scored_by_rouge(tmp_path):
    folder = lively("t5_plain", tmp_path)
    said_before = by_library(folder, SOURCES[0], 40)
    items = [item(0, SOURCES[0], (said_before, "cat"), "summarize"), item(1, SOURCES[4], ("the dog",), "summarize")]
    report = asked(tmp_path, folder, items)
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for one, given in zip(report["documents"], items, strict=True):
        for name, value in scores.score_multi(list(given.answers), one["answer"]).items():
            assert one[name] == pytest.approx(value.fmeasure)
    assert report["measures"]["rouge1"] == pytest.approx(sum(one["rouge1"] for one in report["documents"]) / 2)
    assert {"rouge2", "rougel"} <= report["measures"].keys() and "bleu" not in report["measures"]


def test_model_with_an_encoder_and_a_decoder_is_asked_nothing_else(tmp_path):
    with pytest.raises(StageError, match="ask what the model is not for"):
        asked(tmp_path, model("t5", tmp_path), [Item(id="a", ability="a", prompt="a", answers=("b",))])


def test_decoder_translates_what_it_is_told_in_one_line(tiny, theirs, tmp_path):  # noqa: F811
    prompts = ("The import statement is", "If the object")
    items = [item(n, one, ("the same as it is",)) for n, one in enumerate(prompts)]
    report = asked(tmp_path, tiny, items, baseline=tiny)
    new = len(theirs[1](" the same as it is", add_special_tokens=False)["input_ids"])
    wanted = [said(theirs, one, 2 * new + 16).strip().partition("\n")[0].rstrip() for one in prompts]
    assert [one["answer"] for one in report["documents"]] == wanted
    assert report["measures"]["bleu"] == pytest.approx(BLEU().corpus_score(wanted, [["the same as it is"] * 2]).score)
    assert report["measures"]["kl_divergence"] == 0


def test_decoder_with_a_chat_template_is_told_as_a_user_tells_it(tiny, theirs, tmp_path):  # noqa: F811
    folder = shutil.copytree(tiny, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}The answer is"
    tokenizer.save_pretrained(folder)
    items = [item(0, "If the object", ("the same",)), item(1, "Changed in", ("an object is",), "summarize")]
    documents = asked(tmp_path, folder, items)["documents"]
    for one, given in zip(documents, items, strict=True):
        new = len(tokenizer(f" {given.answers[0]}", add_special_tokens=False)["input_ids"])
        wanted = said(theirs, f"<user> {given.prompt}\nThe answer is", 2 * new + 16)
        assert one["answer"] == wanted.strip().partition("\n")[0].rstrip()
        assert one["answer"]


def test_decoder_answers_a_question_about_a_context(tiny, theirs, tmp_path):  # noqa: F811
    context = "The import statement is the same as the object."
    prompt = f"{context}\n\nQuestion: What is it?\nAnswer:"
    line = said(theirs, prompt, 40).strip().partition("\n")[0].rstrip()
    items = [
        Item(id=str(n), ability="wiki", task="question", prompt="What is it?", context=context, answers=answers)
        for n, answers in enumerate([(line,), ("zanzibar",), ()])
    ]
    items.append(Item(id="bare", ability="wiki", task="question", prompt=prompt, answers=(line,)))
    documents = asked(tmp_path, tiny, items)["documents"]
    assert [one["right"] for one in documents] == [1, 0, 0, 1]
    assert line.startswith(documents[1]["answer"]) and documents[1]["answer"]
    assert [one["exact"] for one in documents] == [1, 0, 0, 1]


def test_set_of_several_tasks_is_measured_by_each_on_its_slice(tiny, tmp_path):
    items = [item(0, "If the object", ("it is",)), Item(id="a", ability="facts", prompt="The name", answers=("of",))]
    report = asked(tmp_path, tiny, items)
    assert "bleu" in report["slices"]["words"] and "accuracy" in report["slices"]["facts"]
    assert not {"bleu", "accuracy"} & report["measures"].keys()


def test_item_without_a_reference_is_refused():
    for answers in ((), (" ",)):
        with pytest.raises(ValueError, match="no reference"):
            item(0, "a", answers)
