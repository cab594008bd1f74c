import pytest

from stages.measures.instructions import followed, units
from stages.measures.items import Item


@pytest.mark.parametrize(
    ("demand", "value", "held", "broken"),
    [
        ("words_at_most", 3, "One two three.", "One two three four"),
        ("words_at_most", 3, "三个字", "这是四字"),
        ("words_at_least", 3, "it's well-known now", "two words"),
        ("lines", 2, "a\n\nb\n", "a b"),
        ("contains", "Blue", "a blue sky", "a red sky"),
        ("omits", "e", "a cat", "a bee"),
        ("starts_with", "Yes", "yes, it is", "No, yes"),
        ("ends_with", "done", "It is DONE", "done it is"),
        ("case", "upper", "ALL OF IT 1", "All of it"),
        ("case", "lower", "all of it 1", "All of it"),
        ("json", None, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("json", None, "[1, 2]", "12"),
        ("language", "zh", "你好 OK", "hello 你"),
        ("language", "en", "hello 你", "你好 OK"),
    ],
)
def test_each_check_tells_what_holds_from_what_does_not(demand, value, held, broken):
    one = Item(id="1", ability="a", task="instructions", prompt="p", checks=({"demand": demand, "value": value},))
    assert followed(one, held)
    assert not followed(one, broken)
    assert not followed(one, " \n")


def test_all_checks_must_hold():
    checks = ({"demand": "contains", "value": "cat"}, {"demand": "words_at_most", "value": 2})
    one = Item(id="1", ability="a", task="instructions", prompt="p", checks=checks)
    assert followed(one, "A cat.")
    assert not followed(one, "There is a cat")
    assert not followed(one, "A dog")


def test_units_count_words_and_characters_of_scripts_without_spaces():
    assert units("Don't stop, well-known e_mail 3.5") == 7
    assert units("我有2只猫") == 5
