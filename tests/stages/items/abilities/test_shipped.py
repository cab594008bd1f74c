"""abilities:// as a whole: how many, of how many kinds, none twice, and every third one held back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from stages.items.abilities.shipped import FAMILIES, shipped
from stages.measures.items import Item
from stages.measures.leaks import words_of
from stages.runtime.fingerprint import ROOT

EVERY = [item for items in shipped().values() for item in items]


def test_set_has_enough_items_of_enough_abilities():
    counts = Counter(item.ability for item in EVERY)
    assert len(EVERY) >= 1200
    assert len(counts) >= 14
    assert min(counts.values()) >= 50, "an ability of a few items cannot be gated"
    assert {item.task for item in EVERY} == {"answers", "choices", "instructions"}
    assert {item.language for item in EVERY} == {"en", "zh"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`abilities://` has {round(len(EVERY), -2):,} items over {len(counts)} abilities" in readme


def test_every_third_item_of_each_ability_is_of_the_test():
    assert list(shipped()) == ["validate", "test"]
    for ability in {item.ability for item in EVERY}:
        mine = sorted(
            (hashlib.sha256(item.id.encode()).digest(), split)
            for split, items in shipped().items()
            for item in items
            if item.ability == ability
        )
        assert [split for _, split in mine] == [
            "test" if number % 3 == 0 else "validate" for number in range(1, len(mine) + 1)
        ]


def test_first_hundred_items_of_a_split_are_of_nearly_every_ability():
    for items in shipped().values():
        assert len({item.ability for item in items[:100]}) >= 20


def test_ids_are_unique_and_no_prompt_stands_twice_in_a_task():
    assert max(Counter(item.id for item in EVERY).values()) == 1
    assert all(item.id.startswith(f"{item.ability}/".replace(" ", "-")) for item in EVERY)
    asked = Counter((" ".join(words_of(item.prompt)), item.task) for item in EVERY)
    assert [prompt for prompt, times in asked.items() if times > 1] == []


def test_no_two_items_of_an_ability_say_the_same():
    """What an item says with its answer, without what its wording brings: its numbers and rarest words."""
    for ability in {item.ability for item in EVERY}:
        mine = [item for item in EVERY if item.ability == ability]
        said = [words_of(told(item)) for item in mine]
        often = Counter(word for words in said for word in {*words})
        rare = [[word for word in words if often[word] <= len(mine) / 8 or word.isdecimal()] for words in said]
        alike = [
            (mine[i].id, mine[j].id)
            for i in range(len(mine))
            for j in range(i)
            if len(rare[i]) > 2 and rare[i] == rare[j]
        ]
        assert alike == []


def told(item: Item) -> str:
    right = item.choices[item.right] if item.choices else " ".join(item.answers[:1])
    return f"{item.prompt} {right}"


def test_right_choice_stands_at_every_place():
    for many in {len(item.choices) for item in EVERY if item.choices}:
        places = Counter(item.right for item in EVERY if len(item.choices) == many)
        total = places.total()
        assert set(places) == set(range(many))
        assert all(abs(count / total - 1 / many) < 4 * (many * total) ** -0.5 for count in places.values())


def test_choices_are_as_many_spaces_from_their_prompt_and_none_gives_itself_away_by_them():
    for item in EVERY:
        if item.choices:
            assert len({choice[:1] == " " for choice in item.choices}) == 1, item.id
            assert not any(a != b and a.startswith(b) for a in item.choices for b in item.choices), item.id
            assert all(choice == choice.rstrip() and choice.strip() for choice in item.choices)
        assert item.prompt == item.prompt.lstrip()
        assert not item.prompt.endswith(" "), f"{item.id} leaves a space that a tokenizer puts to the next word"


def test_no_accepted_answer_stands_in_a_wrong_choice():
    for item in EVERY:
        right = item.choices[item.right].strip() if item.choices else ""
        assert all(right != choice.strip() for number, choice in enumerate(item.choices) if number != item.right)


def test_answers_are_not_told_by_their_prompt_where_the_world_must_be_known():
    open_book = {"copying", "retrieval", "counting", "arithmetic", "code", "word forms"}
    for item in EVERY:
        if item.task == "answers" and item.ability not in open_book:
            last = item.prompt.splitlines()[-1].casefold()
            assert all(answer.casefold() not in words_of(last) for answer in item.answers), item.id


def test_set_is_the_same_in_another_process_language_and_hash_seed():
    code = (
        "import hashlib, json; from stages.items.abilities.shipped import shipped;"
        "print(hashlib.sha256(json.dumps({s: [i.model_dump(mode='json') for i in o] for s, o in shipped().items()})"
        ".encode()).hexdigest())"
    )
    here = json.dumps({split: [item.model_dump(mode="json") for item in items] for split, items in shipped().items()})
    env = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_family_makes_the_same_items_twice(family):
    assert list(family()) == list(family())
