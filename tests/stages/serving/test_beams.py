"""Beam search, held against transformers' own: the same tokens, whatever keeps what was read."""

import dataclasses
import json
import shutil
from dataclasses import replace
from queue import Queue

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from stages.runtime.contract import StageError
from stages.serving.artifact_files import unfollowed
from stages.serving.batching import Batching
from stages.serving.beams import Beams, beams_of, searched
from stages.serving.eager import eager
from stages.serving.engine import open_engine
from stages.serving.generate import greedy
from stages.serving.generation import Generation
from tests.stages.validate.words import model

ROWS = [[5, 6, 7], [9, 8, 12, 13, 30], [11, 12, 13, 14, 15, 16, 17], [40, 41]]
NEW = 12
ENDS = (2, 14, 27, 33, 51, 60, 77)
"""Many tokens end an answer, so that answers of many lengths compete."""
HOWS = [Beams(4), Beams(3, 0.3, True), Beams(2, 2.0, "never"), Beams(5, -1.0, "never"), Beams(4, 0.0, False)]
LIBRARIES = {True: AutoModelForSeq2SeqLM, False: AutoModelForCausalLM}


SPREADS = {"bart": (0.3, 0.1), "marian": (0.1, 0.1)}
"""Of tables and of maps: a random model by itself says one thing for ever, and every search finds that."""


def made(name, folder):
    """A checkpoint with a tokenizer of words that says various things, of which the likeliest first is not the best."""
    if (folder / f"{name}-restless").is_dir():
        return folder / f"{name}-restless"
    restless = shutil.copytree(model(name, folder), folder / f"{name}-restless")
    stacks = json.loads((restless / "config.json").read_text()).get("is_encoder_decoder", False)
    louder, draw = LIBRARIES[stacks].from_pretrained(restless, dtype=torch.float32), torch.Generator().manual_seed(3)
    table, rest = SPREADS.get(name, (0.2, 0.3))
    with torch.no_grad():
        for path, parameter in louder.named_parameters():
            if parameter.dim() > 1:
                of_words = any(one in path for one in ("embed", "shared", "lm_head", "wte", "wpe"))
                spread = 1.0 if "position" in path else table if of_words else rest
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread)
    louder.save_pretrained(restless)
    return restless


def by_library(folder, how, rows=ROWS, **asked):
    """What transformers says to each alone, up to the token that ends it."""
    stacks = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder", False)
    library = LIBRARIES[stacks].from_pretrained(folder, dtype=torch.float32).eval()
    given = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": list(ENDS)} | asked
    given |= {"num_beams": how.count, "length_penalty": how.length_penalty, "early_stopping": how.early_stopping}
    found = []
    for row in rows:
        new = library.generate(input_ids=torch.tensor([row]), **given)[0, 1 if stacks else len(row) :].tolist()
        end = next((at for at, token in enumerate(new) if token in given["eos_token_id"]), len(new))
        found.append(new[: end + 1])
    return found


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "llama", "gpt2", "gemma3"])
def test_answers_by_beams_are_transformers_own(name, tmp_path):
    folder = made(name, tmp_path)
    opened, lengths = eager(folder), set()
    for how in HOWS:
        found = searched(opened.scores, ROWS, how, ends=frozenset(ENDS), most=[NEW] * len(ROWS))
        assert found == by_library(folder, how), how
        lengths |= {len(one) for one in found}
        assert [searched(opened.scores, [row], how, ends=frozenset(ENDS), most=[NEW])[0] for row in ROWS] == found
    plain = greedy(opened.steps(), ROWS, ends=frozenset(ENDS), max_new_tokens=NEW, maximum_tokens=60)
    assert plain != by_library(folder, HOWS[0])
    assert name not in ("t5", "llama") or len(lengths) > 2


def test_each_prompt_has_as_many_tokens_as_it_may(tmp_path):
    folder, most = made("bart", tmp_path), [3, 0, 12, 1]
    found = searched(eager(folder).scores, ROWS, Beams(4), ends=frozenset(ENDS), most=most)
    wanted = [
        by_library(folder, Beams(4), [row], max_new_tokens=n)[0] if n else [] for row, n in zip(ROWS, most, strict=True)
    ]
    assert found == wanted and len(found[3]) == 1


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_tokens_that_are_forced_and_left_out_weigh_as_by_transformers(name, tmp_path):
    folder = shutil.copytree(made(name, tmp_path), tmp_path / "forced")
    plain = by_library(folder, Beams(4))
    path = folder / "generation_config.json"
    out = [[one] for one in sorted({token for row in plain for token in row} - {*ENDS})[:3]]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_bos_token_id": 40, "bad_words_ids": out}))
    found = searched(eager(folder).scores, ROWS, Beams(4), ends=frozenset(ENDS), most=[NEW] * len(ROWS))
    assert found == by_library(folder, Beams(4)) != plain
    assert {row[0] for row in found} == {40}


def settings(folder, to, **told):
    """The checkpoint with such settings of generation."""
    path = shutil.copytree(folder, to) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    return to


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("count", [1, 4])
def test_tokens_that_are_suppressed_and_ends_that_are_forced_are_as_by_transformers(name, count, tmp_path):
    how, without = Beams(count), made(name, tmp_path)
    plain = by_library(without, how, forced_eos_token_id=None)
    said = sorted({token for row in plain for token in row[1:]} - {*ENDS})
    told = {"suppress_tokens": [-1, *said[:3], 99_999], "begin_suppress_tokens": sorted({row[0] for row in plain})}
    told |= {"forced_eos_token_id": ENDS[0], "bad_words_ids": [[ENDS[1]], [said[3]]]}
    folder = settings(without, tmp_path / "told", eos_token_id=[*ENDS], **told)
    opened, wanted = open_engine(folder), by_library(folder, how)
    assert any(len(row) == NEW for row in wanted) and wanted != plain
    most = [opened.most_new(len(row), NEW) for row in ROWS]
    assert most == [NEW - 1] * len(ROWS)
    if count == 1:
        found = greedy(opened.steps(), ROWS, ends=opened.ends, max_new_tokens=most, maximum_tokens=60)
    else:
        asked = opened.searching(Generation(beams=count))
        found = searched(opened.scores, ROWS, asked, ends=opened.ends, most=most)
    assert found == [row[: NEW - 1] for row in wanted]


@pytest.mark.parametrize("count", [1, 3])
def test_token_that_a_decoder_begins_behind_counts_as_said_where_repetition_costs(count, tmp_path):
    start, ends = 5, [2]
    given = {"decoder_start_token_id": start, "eos_token_id": ends, "forced_eos_token_id": None}
    folder = settings(made("bart", tmp_path), tmp_path / "told", **given)
    opened, tokenizer = open_engine(folder), AutoTokenizer.from_pretrained(folder)
    asked = {"max_new_tokens": NEW, "repetition_penalty": 1.8}
    wanted = by_library(folder, Beams(count), eos_token_id=ends, **asked)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in wanted]
    assert opened.start == start
    assert opened.generate(ROWS, beams=count, **asked) == texts
    assert replace(opened, start=None).generate(ROWS, beams=count, **asked) != texts
    rows = Batching(opened)
    try:
        heard = [Queue() for _ in ROWS]
        if count == 1:
            rows.ask(ROWS, Generation(**asked), lambda at, one: heard[at].put(one))
            assert [one.get(timeout=30).text for one in heard] == texts
    finally:
        rows.close()


def test_settings_that_are_not_followed_are_named():
    assert unfollowed({"min_length": 5, "no_repeat_ngram_size": 3, "guidance_scale": 1.0, "suppress_tokens": [7]}) == []
    told = {"encoder_no_repeat_ngram_size": 3, "guidance_scale": 1.5, "sequence_bias": [[[7], -1.0]]}
    assert unfollowed(told) == ["encoder_no_repeat_ngram_size 3", "sequence_bias [[[7], -1.0]]", "guidance_scale 1.5"]


def test_settings_of_an_encoder_decoder_are_followed_as_by_transformers(tmp_path):
    folder = shutil.copytree(made("t5", tmp_path), tmp_path / "asking")
    path, asked = folder / "generation_config.json", {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | asked | {"eos_token_id": list(ENDS)}))
    opened, texts = open_engine(folder), ["the cat sat", "a dog was in rome", "who is it"]
    library, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def theirs(text, **more):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return tokenizer.decode(
            library.generate(input_ids=ids, max_new_tokens=NEW, **more)[0], skip_special_tokens=True
        )

    by_default, plain = [theirs(one) for one in texts], [theirs(one, num_beams=1) for one in texts]
    assert opened.generate(texts, max_new_tokens=NEW) == by_default != plain
    assert opened.generate(texts, max_new_tokens=NEW, beams=1) == plain
    assert opened.generate(texts, max_new_tokens=NEW, beams=5) == [theirs(one, num_beams=5) for one in texts]
    assert list(opened.stream(texts[1], max_new_tokens=NEW)) == [by_default[1]]
    drawn = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 3}
    assert opened.generate(texts, **drawn) == opened.generate(texts, **drawn, beams=1)


def test_decoder_is_greedy_unless_it_is_asked(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "asking")
    path = folder / "generation_config.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | {"num_beams": 4, "length_penalty": 0.5}))
    opened, prompts = open_engine(folder), ["The for statement is used to", "A class"]
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = opened.generate(prompts, max_new_tokens=NEW)
    assert plain == open_engine(tiny).generate(prompts, max_new_tokens=NEW)

    def theirs(prompt, **more):
        ids = opened.tokenizer.encode(prompt).ids
        given = {"input_ids": torch.tensor([ids]), "max_new_tokens": NEW, "eos_token_id": sorted(opened.ends) or None}
        return opened.tokenizer.decode(library.generate(**given, num_beams=4, **more)[0, len(ids) :].tolist())

    wanted = [theirs(one) for one in prompts]
    assert opened.generate(prompts, max_new_tokens=NEW, beams=4) == wanted != plain
    penalized = [theirs(one, repetition_penalty=1.5) for one in prompts]
    assert opened.generate(prompts, max_new_tokens=NEW, beams=4, repetition_penalty=1.5) == penalized != wanted
    stop = wanted[0][4:7]
    (cut,) = opened.generate(prompts[:1], max_new_tokens=NEW, beams=4, stop=[stop])
    assert stop not in cut


def test_beams_that_cannot_be_followed_are_refused(tiny, tmp_path):
    opened = open_engine(tiny)
    with pytest.raises(StageError, match=r"comes in no pieces; measured 2 beams; limit 1"):
        opened.stream("a", beams=2)
    with pytest.raises(StageError, match=r"beams are not drawn; measured 2 beams at temperature 0.5"):
        opened.generate(["a"], beams=2, temperature=0.5)
    for beams in (0, 65):
        with pytest.raises(StageError, match=rf"beams is out of range; measured {beams}; limit 1 to 64"):
            Generation(beams=beams)
    forgetful = dataclasses.replace(opened, steps=None, scores=None)
    with pytest.raises(StageError, match=r"keeps nothing of what it has read.*measured 2 beams"):
        forgetful.generate(["a"], beams=2)
    assert forgetful.generate(["a"], beams=1, max_new_tokens=3) == opened.generate(["a"], max_new_tokens=3)


@pytest.mark.parametrize(
    "told", [{"num_beams": 0}, {"num_beams": "4"}, {"length_penalty": "long"}, {"early_stopping": "soon"}]
)
def test_settings_that_are_none_are_refused(told):
    assert beams_of({"num_beams": None}, "translate") == Beams()
    assert beams_of({"early_stopping": "never"}, "translate").early_stopping == "never"
    assert beams_of({"num_beams": 100}, "generate") == Beams()  # a decoder follows one, whatever is said of more
    with pytest.raises(StageError, match="ask for beams that are none"):
        beams_of(told, "translate")


def test_state_goes_on_in_the_order_that_is_asked_for(tmp_path):
    for name in ("llama", "bart"):
        opened = eager(made(name, tmp_path))
        steps, order, more = opened.steps(), np.array([2, 0, 0, 3]), np.array([7, 8, 9, 10])
        ids, mask = np.array([[0, 5, 6], [7, 8, 9], [0, 0, 4], [3, 2, 1]]), np.ones((4, 3), np.int64)
        mask[0, 0] = mask[2, :2] = 0
        steps.begin(ids, mask)
        steps.reorder(order)
        again = opened.steps()
        again.begin(ids[order], mask[order])
        np.testing.assert_allclose(steps.next(more), again.next(more), atol=1e-5)
