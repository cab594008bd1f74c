import pytest

from stages.measures.answers import normalized, repeats, right
from stages.measures.items import Item

PARIS = {"answers": ("Paris",)}
TWELVE = {"answers": ("12", "12.5"), "match": "numeric"}
ANYWHERE = {"answers": ("blue", "azure"), "match": "contains"}


def item(**given):
    return Item(id="1", ability="a", prompt="p", **given)


@pytest.mark.parametrize(
    ("given", "text", "verdict"),
    [
        (PARIS, " Paris.", True),
        (PARIS, " Paris", True),
        (PARIS, "\n\nParis, the city of light", True),
        (PARIS, ' "paris" is', True),
        (PARIS, " the Paris", True),
        (PARIS, " Parisian", False),
        (PARIS, " France, whose capital is Paris", False),
        (PARIS, "", False),
        (PARIS, " Lyon\nParis", False),
        ({"answers": ("New York", "NYC")}, " New  York City", True),
        ({"answers": ("New York", "NYC")}, " New Yorker", False),
        ({"answers": ("北京",)}, "北京市是", True),
        ({"answers": ("北京",)}, "\uff1a北京。", True),
        ({"answers": ("北京",)}, "东京", False),
        ({"answers": ("Au",)}, " AU", True),
        ({"answers": ("Au",)}, " August", False),
        (TWELVE, " 12 apples", True),
        (TWELVE, " The answer is 12.5.", True),
        (TWELVE, " 12.0", True),
        (TWELVE, " 1,200", False),
        (TWELVE, " 13, not 12", False),
        (TWELVE, " twelve", False),
        ({"answers": ("-3",), "match": "numeric"}, " \u22123", True),
        ({"answers": ("1200",), "match": "numeric"}, " 1,200 km", True),
        ({"answers": ("15",), "match": "numeric"}, "答案是15个。", True),
        ({"answers": ("15",), "match": "numeric"}, " 15km", False),
        ({"answers": ("-5",)}, " -5.", True),
        ({"answers": ("-5",)}, " \u22125", True),
        ({"answers": ("-5",)}, " 5", False),
        ({"answers": ("5",)}, " -5", False),
        ({"answers": ("5",)}, " = 5", True),
        ({"answers": (".5",)}, " 5", False),
        ({"answers": ("5",)}, " ...5", True),
        ({"answers": ("+",)}, " + is a sign", True),
        ({"answers": ("+",)}, " plus", False),
        ({"answers": ("+",)}, "加", False),
        ({"answers": ("\u221a", "?")}, ' "?"', True),
        ({"answers": ("\u221a",), "match": "contains"}, "根号是\u221a。", True),
        ({"answers": ("A",)}, " A is correct", True),
        ({"answers": ("A",)}, " (A) is", True),
        ({"answers": ("A",)}, " B", False),
        ({"answers": ('"',)}, ' "', True),
        (ANYWHERE, " It is blue, I think", True),
        (ANYWHERE, " It is blueish", False),
        (ANYWHERE, " It is not red\nblue", False),
        (ANYWHERE, " a sky of azure", True),
    ],
)
def test_whole_answer_is_right_or_wrong(given, text, verdict):
    assert right(item(**given), text, ended=True) is verdict


@pytest.mark.parametrize(
    "given", [PARIS, TWELVE, ANYWHERE, {"answers": ("New York", "the Big Apple")}, {"answers": ("-5", "+", "A")}]
)
@pytest.mark.parametrize(
    "text",
    [
        " Paris is",
        " Parisian ways",
        " the Paris",
        " It is blue.",
        " 12.5 kg",
        " 125",
        " New York.",
        " a blue 12 ",
        " The big apple\n",
        ' "+" is',
        " -5 or so",
        " A is",
    ],
)
def test_answer_that_is_settled_early_is_never_settled_otherwise_later(given, text):
    whole = right(item(**given), text, ended=True)
    early = [right(item(**given), text[:length], ended=False) for length in range(len(text) + 1)]
    assert {one for one in early if one is not None} <= {whole}


def test_wrong_answer_is_settled_by_its_first_letters():
    assert right(item(**PARIS), " Fr", ended=False) is False
    assert right(item(**PARIS), " Pa", ended=False) is None
    assert right(item(**PARIS), " Paris", ended=False) is None, "more letters may follow"
    assert right(item(**PARIS), " Paris ", ended=False) is True


def test_normalized_text_has_one_case_width_and_spacing():
    assert normalized("  - The\u3000\uff21\uff22\uff23  d") == "abc d"


def test_repeats_needs_the_same_tokens_again_and_again():
    assert repeats([5, 1, 2, 1, 2, 1, 2])
    assert repeats([7] * 6)
    assert not repeats([7] * 5)
    assert not repeats([1, 2, 3, 1, 2, 3])
    assert repeats([9, *[1, 2, 3] * 3])
    assert not repeats(list(range(40)))
    assert not repeats([1, 2, 1, 2, 1, 2, 3])


@pytest.mark.parametrize("answer", ["12 kg", "$5", "12%", "twelve", "1e5"])
def test_item_that_is_compared_as_a_number_accepts_numbers_alone(answer):
    with pytest.raises(ValueError, match="compared as a number and accepts"):
        item(answers=("12", answer), match="numeric")
