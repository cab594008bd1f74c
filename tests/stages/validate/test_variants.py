"""Items as people type them: what changes, what never does, and what a model's answers to them come to."""

import difflib
import re
import unicodedata
from collections import Counter

import pytest

from stages.items.abilities.shipped import shipped
from stages.measures.items import Item
from stages.validate.params import ValidateParams
from stages.validate.variants import variant
from tests.stages.validate.test_questions import asked, items, said, theirs  # noqa: F401 two of them are fixtures

KINDS = ("typos", "case", "space")
EVERY = [item for split in ("validate", "test") for item in shipped()[split]]


def item(prompt, answers=("Paris",), language="en", name="a"):
    return Item(id=name, ability="x", prompt=prompt, answers=answers, language=language)


def squeezed(text):
    return re.sub(r" +", " ", text)


def test_only_the_prompt_changes_and_by_what_its_kind_says():
    counts = Counter()
    for one in EVERY:
        for kind in KINDS:
            other = variant(one, kind)
            if other is None:
                continue
            counts[kind, one.language] += 1
            assert other.model_copy(update={"prompt": one.prompt}) == one and other.prompt != one.prompt
            ends = [text[-1].casefold() for text in (other.prompt, one.prompt)]
            assert ends[0] == ends[1] or one.language == "zh", "the answer follows what it followed"
            if one.language == "zh":
                continue
            if kind == "space":
                assert squeezed(other.prompt) == squeezed(one.prompt)
            elif kind == "case":
                assert other.prompt.casefold() == one.prompt.casefold()
            else:
                words = [text.split(" ") for text in (one.prompt, other.prompt)]
                changed = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
                assert 0 < len(changed) <= max(1, len(re.findall(r"\w+", one.prompt)) // 8) * 2
                assert all(difflib.SequenceMatcher(None, *pair).ratio() > 0.7 for pair in changed)
                assert all(a[0] == b[0] and a[-1] == b[-1] for a, b in changed)
    assert min(counts[kind, "en"] for kind in KINDS) > 1000 and counts["typos", "zh"] > 20


def test_answers_choices_numbers_and_quotes_stay_as_they_are():
    for one in EVERY:
        kept = [text.strip() for text in (*one.answers, *one.choices)]
        kept += [check.value for check in one.checks if isinstance(check.value, str)]
        kept += re.findall(r"\S*\d\S*|\"[^\"\n]*\"", one.prompt)
        for kind in KINDS:
            if (other := variant(one, kind)) is not None:
                there = [text for text in kept if text in one.prompt]
                assert all(text in other.prompt for text in there), (kind, one.prompt, other.prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_variant_is_the_same_each_time_and_another_of_each_item(kind):
    prompt = "Beautiful mountains surround wonderful villages between several enormous valleys everywhere around"
    first = variant(item(prompt), kind)
    assert first == variant(item(prompt), kind)
    others = {variant(item(prompt, name=str(number)), kind).prompt for number in range(8)}
    assert len(others) == 1 if kind == "case" else len(others) > 2


def test_exact_variants_of_known_prompts():
    assert variant(item("The capital of France is"), "case").prompt == "the capital of france is"
    assert variant(item("the capital of france is"), "case").prompt == "THE CAPITAL of FRANCE is"
    assert (
        variant(item("NaCl and He: USA is no word in Latin"), "case").prompt == "NaCl and He: USA is no word in latin"
    )
    assert variant(item("Say Paris after 'Paris Match' here", ("Paris",)), "space").prompt.count("Paris Match") == 1
    assert variant(item("法国的首都，是", ("巴黎",), "zh"), "case").prompt == "法国的首都,是"
    assert variant(item("法国的首都，是", ("巴黎",), "zh"), "space").prompt == "法国的首都， 是"
    assert variant(item("法国的首都，是", ("巴黎",), "zh"), "typos").prompt == "法国地首都，是"


@pytest.mark.parametrize(
    "prompt", ["def total(rows):\n    return", "data = json.", "<b>bold", "5 + 1 = 6\n7 + 2", "2024", "法国"]
)
def test_code_and_what_has_nothing_to_touch_has_no_typing_errors(prompt):
    assert variant(item(prompt, language="zh" if unicodedata.category(prompt[0]) == "Lo" else "en"), "typos") is None


def test_variants_are_asked_beside_and_change_nothing_else(tiny, theirs, items, tmp_path):  # noqa: F811
    """Each variant's answer is what transformers says to its prompt."""
    plain = asked(tmp_path, tiny, items, baseline=tiny)
    params = ValidateParams(variants=("space", "typos", "case", "typos"))
    assert params.variants == KINDS
    varied = asked(tmp_path, tiny, items, params, baseline=tiny)
    added = {"variants", "varied", "varied_right", "varied_flipped"}
    assert [{k: v for k, v in one.items() if k not in added} for one in varied["documents"]] == plain["documents"]
    right = written = flipped = pairs = 0
    for one, document in zip(items, varied["documents"], strict=True):
        own = {kind: other for kind in KINDS if (other := variant(one, kind))}
        assert document["variants"].keys() == own.keys()
        for kind, other in own.items():
            got = document["variants"][kind]
            assert got["prompt"] == other.prompt
            if one.task == "answers":
                answer = said(theirs, other.prompt, 30)
                assert answer.startswith(got["answer"])
                assert got["right"] == bool(re.match(rf"\W*{one.answers[0]}\b", answer))
            right, written, pairs = right + got["right"], written + document["right"], pairs + 1
            flipped += got["right"] != document["right"]
    assert 0 < flipped < pairs, "the case is one in which something flips"
    assert varied["measures"]["robustness"] == pytest.approx(right / written)
    assert varied["measures"]["variant_flips"] == pytest.approx(flipped / pairs)
    told = varied["variants"]
    assert sum(one["items"] for one in told.values()) == pairs and sum(one["right"] for one in told.values()) == right
    case = [one for one in varied["documents"] if "case" in one["variants"]]
    ratio = sum(one["variants"]["case"]["right"] for one in case) / sum(one["right"] for one in case)
    assert told["case"]["robustness"] == pytest.approx(ratio)


def test_model_that_has_nothing_right_has_no_robustness(tiny, items, tmp_path):  # noqa: F811
    wrong = [one for one in items if one.ability == "even"]
    measures = asked(tmp_path, tiny, wrong, ValidateParams(variants=("case",)))["measures"]
    assert "robustness" not in measures and measures["variant_flips"] == 0
