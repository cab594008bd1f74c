import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.runtime.contract import StageError
from stages.serving.eager import eager
from stages.serving.generate import confirmed, greedy, padded
from tests.stages.models.families import family

PROMPTS = [[5, 9, 200], [31], [7, 8, 9, 10, 11, 12, 13], [400, 401]]
NEW = 10


@pytest.fixture(scope="module")
def opened(tiny):
    return eager(tiny)


@pytest.fixture(scope="module")
def expected(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = [
        model.generate(torch.tensor([one]), do_sample=False, max_new_tokens=NEW, eos_token_id=None) for one in PROMPTS
    ]
    return [one[0, len(prompt) :].tolist() for one, prompt in zip(ids, PROMPTS, strict=True)]


class Counting:
    """A forward that counts how many rows it is asked, and how often."""

    def __init__(self, forward):
        self.forward, self.calls, self.rows = forward, 0, 0

    def __call__(self, ids_NT, mask_NT):
        self.calls, self.rows = self.calls + 1, self.rows + len(ids_NT)
        return self.forward(ids_NT, mask_NT)


def said(forward, **given):
    asked = {"ends": frozenset(), "max_new_tokens": NEW, "maximum_tokens": 96} | given
    return greedy(forward, PROMPTS, **asked)


def test_greedy_side_by_side_says_what_transformers_says_of_each_alone(opened, expected):
    assert said(opened.forward) == expected


@pytest.mark.parametrize("right", [0, 1, 4, NEW])
def test_guess_changes_nothing_but_the_passes(opened, expected, right):
    drafts = [[*one[:right], *[(token + 1) % 768 for token in one[right:]]] for one in expected]
    ids_NT, mask_NT = padded([[*prompt, *draft] for prompt, draft in zip(PROMPTS, drafts, strict=True)])
    begun = [
        confirmed(logits_TV[len(prompt) - 1 : len(prompt) + NEW], draft, frozenset(), lambda new: False)
        for prompt, draft, logits_TV in zip(PROMPTS, drafts, opened.forward(ids_NT, mask_NT), strict=True)
    ]
    assert [one[:NEW] for one in begun] == [one[: right + 1] for one in expected]
    counted = Counting(opened.forward)
    assert [one[:NEW] for one in said(counted, begun=begun)] == expected
    assert counted.calls == max(0, NEW - right - 1)


def test_guess_is_read_up_to_where_it_ends(opened, expected):
    first = expected[0]
    logits_TV = opened.forward(*padded([[*PROMPTS[0], *first]]))[0][len(PROMPTS[0]) - 1 :]
    at = first.index(first[3])
    assert confirmed(logits_TV, first, frozenset({first[3]}), lambda new: False) == first[: at + 1]
    assert confirmed(logits_TV, first, frozenset(), lambda new: len(new) == 2) == first[:2]


DECODERS = "llama mistral qwen3 gpt2 neox opt gemma2 gemma3 bloom falcon phi3 xglm biogpt mamba".split()


@pytest.mark.parametrize("name", DECODERS)
def test_model_that_keeps_what_it_read_says_the_same(name, tmp_path):
    opened = eager(family(name, tmp_path))
    prompts = [[5, 9, 20], [31], [7, 8, 9, 10, 11, 12, 13], [40, 41]]
    asked = {"ends": frozenset(), "max_new_tokens": [8, 3, 8, 6], "maximum_tokens": 60}
    alone = [greedy(opened.forward, [one], **asked | {"max_new_tokens": 8})[0] for one in prompts]
    wanted = [one[:most] for one, most in zip(alone, asked["max_new_tokens"], strict=True)]
    assert greedy(opened.forward, prompts, **asked) == wanted
    assert (opened.steps is None) == (name == "mamba")
    if opened.steps:
        assert greedy(opened.steps(), prompts, **asked) == wanted
        assert greedy(opened.steps(), prompts, **asked, begun=[one[:2] for one in wanted]) == wanted


def test_each_prompt_ends_where_it_is_to_end(opened, expected):
    ends = frozenset({expected[0][3], expected[2][5]})
    cut = [next((at for at, token in enumerate(one) if token in ends), NEW - 1) + 1 for one in expected]
    assert said(opened.forward, ends=ends) == [one[:at] for one, at in zip(expected, cut, strict=True)]
    most = [2, 0, 5, 1]
    assert said(opened.forward, max_new_tokens=most) == [one[:at] for one, at in zip(expected, most, strict=True)]
    enough = said(opened.forward, enough=lambda number, new: len(new) > number)
    assert enough == [one[: number + 1] for number, one in enumerate(expected)]
    longest = said(opened.forward, maximum_tokens=9)
    assert [len(one) for one in longest] == [6, 8, 2, 7]


def test_prompt_that_fills_the_model_is_not_continued(opened):
    assert greedy(opened.forward, [[1] * 9], ends=frozenset(), max_new_tokens=4, maximum_tokens=9) == [[]]
    assert greedy(lambda *_: np.empty(0), [], ends=frozenset(), max_new_tokens=4, maximum_tokens=9) == []


class Watched:
    """Steps that note how many rows they read; `fixed` ones keep all of them."""

    def __init__(self, steps, fixed=False):
        self.steps, self.fixed, self.rows, self.begin = steps, fixed, [], steps.begin

    def next(self, tokens_N):
        self.rows.append(len(tokens_N))
        return self.steps.next(tokens_N)

    def reorder(self, rows_N):
        if self.fixed:
            raise StageError("rows stay where they are")
        self.steps.reorder(rows_N)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_rows_that_have_ended_are_given_up_once_they_are_half(name, fixed, tmp_path):
    model = eager(family(name, tmp_path))
    rows, most = [[5, 9, 40, 41, 3, 8], [31], [7, 8, 9], [44]], [2, 9, 5, 3]

    def told(prompts, most, steps):
        return greedy(steps, prompts, ends=frozenset(), max_new_tokens=most, maximum_tokens=48)

    alone = [told([row], [count], model.steps())[0] for row, count in zip(rows, most, strict=True)]
    watched = Watched(model.steps(), fixed)
    assert told(rows, most, watched) == alone
    assert watched.rows == ([4] * 8 if fixed else [4, 4, 2, 2, 1, 1, 1, 1])
