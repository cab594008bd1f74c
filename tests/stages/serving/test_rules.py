"""What settings of generation allow, held against transformers: the same tokens, alone, side by side and by beams."""

from functools import cache
from queue import Queue

import numpy as np
import pytest
import torch

from stages.runtime.contract import StageError
from stages.serving.batching import Batching
from stages.serving.engine import open_engine
from stages.serving.generation import Generation
from stages.serving.rules import FREE, rules_of
from tests.stages.serving.test_beams import ENDS, LIBRARIES, NEW, ROWS, made, settings

PROMPTS = [*ROWS, [40]]


def asked_for(said):
    """Settings that forbid something of what a model says without them, by what they set."""
    often = sorted({token for row in said for token in row} - {*ENDS})
    pair = next([*row[at : at + 2]] for row in said for at in range(1, len(row) - 1) if ENDS[0] not in row[at : at + 2])
    return {
        "suppressed": {"suppress_tokens": [-1, *often[:3], 99_999]},
        "suppressed first": {"begin_suppress_tokens": sorted({row[0] for row in said})},
        "first": {"forced_bos_token_id": 44, "begin_suppress_tokens": often},
        "words": {"bad_words_ids": [pair, [often[0]], [ENDS[0]], [50, 51, 52, 53, 54]]},
        "runs": {"no_repeat_ngram_size": 2},
        "once": {"no_repeat_ngram_size": 1},
        "length": {"min_length": 9},
        "new": {"min_new_tokens": 7, "min_length": 40},
        "penalty": {"repetition_penalty": 1.6},
        "last": {"forced_eos_token_id": ENDS[0]},
        "all": {
            "suppress_tokens": often[:2],
            "no_repeat_ngram_size": 3,
            "min_new_tokens": 4,
            "repetition_penalty": 1.3,
        },
    }


CASES = [("llama", what) for what in asked_for([[5, 6, 7]])]
CASES += [("bart", what) for what in ("first", "words", "all")]
FREED = {"forced_eos_token_id": None, "eos_token_id": [*ENDS]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("rules")


@cache
def library(folder):
    """What transformers says to each alone, up to the token that ends it, by settings and so many beams."""
    stacks = "bart" in folder.name
    opened = LIBRARIES[stacks].from_pretrained(folder, dtype=torch.float32).eval()

    def said(beams, **told):
        found = []
        for row in PROMPTS:
            given = FREED | told | {"max_new_tokens": NEW, "num_beams": beams, "do_sample": False}
            ids = torch.tensor([row])
            new = opened.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **given)
            new = new[0, 1 if stacks else len(row) :].tolist()
            end = next((at for at, token in enumerate(new) if token in ENDS), len(new))
            found.append(new[: end + 1])
        return found

    return said


@pytest.mark.parametrize(("name", "what"), CASES)
def test_answers_follow_the_settings_as_by_transformers(name, what, root):
    without = made(name, root)
    say = library(without)
    plain = [plainly(without, count) for count in (1, 3)]
    told = asked_for(plain[0] + plain[1])[what]
    folder = settings(without, root / f"{name} {what}", **FREED | told)
    opened, wanted = open_engine(folder), [say(count, **told) for count in (1, 3)]
    assert wanted[0] != plain[0] or wanted[1] != plain[1]
    texts = [[opened.tokenizer.decode(row) for row in rows] for rows in wanted]
    assert opened.generate(PROMPTS, max_new_tokens=NEW) == texts[0]
    assert opened.generate(PROMPTS, max_new_tokens=NEW, beams=3) == texts[1]
    assert ["".join(opened.stream(one, max_new_tokens=NEW)) for one in PROMPTS] == texts[0]
    rows, heard = Batching(opened, rows=3), [Queue() for _ in PROMPTS]
    try:
        rows.ask(PROMPTS, Generation(max_new_tokens=NEW), lambda at, one: heard[at].put(one))
        assert [one.get(timeout=30).text for one in heard] == texts[0]
    finally:
        rows.close()


@cache
def plainly(folder, count):
    return library(folder)(count)


def test_who_asks_says_what_repetition_costs(root):
    without = made("llama", root)
    opened = open_engine(settings(without, root / "costly", **FREED, repetition_penalty=1.6))
    free = opened.generate(PROMPTS, max_new_tokens=NEW, repetition_penalty=1.0)
    assert free == [opened.tokenizer.decode(row) for row in plainly(without, 1)]
    assert free != opened.generate(PROMPTS, max_new_tokens=NEW)


def test_settings_that_ask_for_nothing_leave_the_scores_as_they_are():
    none = {"suppress_tokens": [], "bad_words_ids": None, "min_length": 0, "no_repeat_ngram_size": 0}
    assert rules_of(none, frozenset()) == FREE
    score_V = np.arange(4, dtype=np.float32)
    assert FREE.allowed(score_V, [1, 2], 1) is score_V


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"suppress_tokens": 7}, r"suppress_tokens: 7; limit a list of whole numbers"),
        ({"bad_words_ids": [7]}, r"bad_words_ids: \[7\]; limit a list of lists"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids: \[\[\]\]"),
        ({"no_repeat_ngram_size": -1}, r"no_repeat_ngram_size: -1; limit a whole number from 0 on"),
        ({"min_new_tokens": 2.5}, r"min_new_tokens: 2.5"),
        ({"repetition_penalty": 0}, r"repetition_penalty: 0; limit a number from 0.01 to 100.0"),
        ({"forced_bos_token_id": [3]}, r"forced_bos_token_id: \[3\]"),
    ],
)
def test_settings_that_are_none_are_refused(told, said):
    with pytest.raises(StageError, match=said):
        rules_of(told, frozenset({2}))
