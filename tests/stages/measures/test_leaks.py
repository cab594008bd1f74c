"""leaks: what was planted is found, in whatever case and punctuation, and nothing else is."""

from __future__ import annotations

import random
import time
from pydoc_data.topics import topics

from hypothesis import given
from hypothesis import strategies as st

from stages.adapters import texts
from stages.items.abilities.shipped import shipped
from stages.measures.items import Check, Item
from stages.measures.leaks import SHINGLE_WORDS, leaks, words_of

EVERY = [item for items in shipped().values() for item in items]
CAPITAL = Item(id="capital", ability="facts", prompt="The capital of France is", answers=("Paris", "Paris, France"))
CHOSEN = Item(
    id="coat", ability="c", task="choices", prompt="It was cold, so", choices=(" he swam.", " he shivered."), right=1
)
TOLD = Item(
    id="told",
    ability="i",
    task="instructions",
    prompt="Write a short poem about the sea that rhymes and has no more than four lines.",
    checks=(Check(demand="lines", value=4),),
)
LONG = Item(
    id="long",
    ability="r",
    prompt="Anna went to the market in the old town on Monday and bought a basket of ripe red apples for her",
    answers=("mother",),
)


def told(item: Item) -> str:
    return item.prompt + item.choices[item.right] if item.choices else f"{item.prompt} {' '.join(item.answers[:1])}"


def test_reference_texts_hold_no_item_of_the_set_that_ships():
    assert leaks(EVERY, topics.items()) == []
    assert leaks(EVERY, [(one.name, one.text) for one in texts.generated("descriptions://constraints")]) == []


def test_every_item_that_is_planted_whole_is_found_and_no_other():
    drawn = random.Random(5)
    prose = " ".join(topics.values()).split()
    passages = []
    for item in EVERY:
        at = drawn.randrange(len(prose) - 200)
        passages.append((item.id, " ".join([*prose[at : at + 60], told(item), *prose[at + 60 : at + 120]])))
    assert leaks(EVERY, passages) == [(item.id, item.id) for item in EVERY]


def test_case_space_and_punctuation_hide_nothing():
    hidden = "Well -- THE CAPITAL,\n\n of   “France” is:\tparis!"
    assert leaks([CAPITAL], [("p", hidden)]) == [("capital", "p")]
    assert leaks([CAPITAL], [("p", "\uff34he capital of France is Paris")]) == [("capital", "p")], "full-width letters"


def test_prompt_without_its_answer_is_no_leak():
    assert leaks([CAPITAL], [("p", "The capital of France is a city on the Seine, and Paris is large.")]) == []
    assert leaks([CHOSEN], [("p", "It was cold, so he swam.")]) == []
    assert leaks([CHOSEN], [("p", "it was cold so he shivered")]) == [("coat", "p")]
    assert leaks([TOLD], [("p", TOLD.prompt.upper())]) == [("told", "p")]


def test_question_and_translation_leak_with_their_answers_only():
    asked = Item(id="q", ability="q", task="question", prompt="Who lives in the tower?", context="c", answers=("Ada",))
    nobody = Item(id="n", ability="q", task="question", prompt="Who owns the old tower?", context="c")
    told = Item(id="t", ability="t", task="translate", prompt="der Turm", answers=("the tower",))
    texts = [("a", "Who lives in the tower? Who owns the old tower? Der Turm"), ("b", "Who lives in the tower? Ada. ")]
    assert leaks([asked, nobody, told], [*texts, ("c", "Der Turm: the tower")]) == [("q", "b"), ("t", "c")]


def test_any_accepted_answer_counts_and_each_pair_is_told_once():
    twice = "The capital of France is Paris. The capital of France is Paris, France."
    assert leaks([CAPITAL, CHOSEN], [("a", twice), ("b", "nothing"), ("c", twice)]) == [
        ("capital", "a"),
        ("capital", "c"),
    ]


def test_longer_item_with_a_word_changed_is_found_and_a_short_one_is_not():
    near = LONG.prompt.replace("ripe red", "big red") + " mother and left."
    assert leaks([LONG], [("p", near)]) == [("long", "p")]
    far = "Anna went to a shop in the new town on Friday and bought a basket of ripe red apples for her mother"
    assert leaks([LONG], [("p", far)]) == []
    assert leaks([CAPITAL], [("p", "The capital of old France is Paris")]) == []


def test_word_runs_of_an_item_that_lie_all_over_a_text_are_no_leak():
    words = words_of(told(LONG))
    scattered = [" ".join([*words[i : i + 4], *(["filler"] * 40)]) for i in range(len(words) - 3)]
    assert leaks([LONG], [("p", " ".join(scattered))]) == []


def test_signs_of_arithmetic_are_words_and_hyphens_are_not():
    sums = Item(id="sum", ability="a", prompt="2 + 3 =", answers=("5",), match="numeric")
    assert leaks([sums], [("p", "numbers 2, 3, 5, 7")]) == []
    assert leaks([sums], [("p", "we know that 2+3 = 5.")]) == [("sum", "p")]
    assert words_of("well-known 5 - 2 = 3") == ["well", "known", "5", "-", "2", "=", "3"]


def test_chinese_is_compared_by_characters():
    chinese = Item(
        id="zh", ability="z", language="zh", task="choices", prompt="中国的首都是", choices=("上海", "北京"), right=1
    )
    assert leaks([chinese], [("p", "大家知道，中国的首都是北京。")]) == [("zh", "p")]
    assert leaks([chinese], [("p", "大家知道，中国的首都是上海。")]) == []


@given(st.lists(st.sampled_from("abcd"), max_size=60), st.lists(st.sampled_from("abcd"), min_size=3, max_size=7))
def test_short_items_are_found_exactly_where_a_search_of_strings_finds_them(text, sought):
    item = Item(id="i", ability="a", prompt=" ".join(sought[:-1]), answers=(sought[-1],))
    found = leaks([item], [("p", " ".join(text))])
    assert bool(found) == (f" {' '.join(sought)} " in f" {' '.join(text)} ")


def test_twenty_megabytes_are_searched_in_one_pass():
    """Doubling the items hardly costs more: each run of words is looked up once."""
    text = [(name, said) for name, said in topics.items() if len(said) > 2000]

    def seconds(items: list[Item]) -> float:
        begun = time.process_time()
        assert leaks(items, text) == []
        return time.process_time() - begun

    few = min(seconds(EVERY[:50]) for _ in range(3))
    all_of_them = min(seconds(EVERY) for _ in range(3))
    assert all_of_them < 4 * few + 0.2
    assert SHINGLE_WORDS == 3
