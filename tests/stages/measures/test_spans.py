"""Answers to questions, held against values by SQuAD's and CMRC's rules, worked out by hand or by brute force."""

import itertools

import numpy as np
import pytest

from stages.measures import spans
from stages.measures.item_scores import columns


@pytest.mark.parametrize(
    ("accepted", "said", "exact", "overlap"),
    [
        (["Denver Broncos"], "The Denver  Broncos!", 1, 1),
        (["the Eiffel Tower"], "Eiffel tower", 1, 1),
        (["Eiffel Tower"], "a tower in Paris", 0, 2 / 5),  # "tower in Paris": 1 of 3, 1 of 2
        (["1,000"], "1000", 1, 1),
        (["a b b c"], "b b b", 0, 4 / 6),  # "a" is an article: b b c against b b b
        (["red", "dark red"], "dark red", 1, 1),
        (["red", "blue"], "red car", 0, 2 / 3),
        (["x"], "", 0, 0),
        ([], "", 1, 1),
        ([], "The", 1, 1),
        ([], "Paris", 0, 0),
        (["the"], "", 1, 1),  # nothing is left of what is accepted, so that nothing is
        (["theatre"], "atre", 0, 0),
    ],
)
def test_english_answers_are_scored_by_squads_rules(accepted, said, exact, overlap):
    found = spans.scored(accepted, "en", said)
    assert (found["exact"], found["overlap"]) == (exact, pytest.approx(overlap))


@pytest.mark.parametrize(
    ("accepted", "said", "exact", "overlap"),
    [
        (["北京"], "北京。", 1, 1),
        (["《红楼梦》"], "红楼梦", 1, 1),
        (["北京市"], "在北京", 0, 2 * 2 / 6),
        (["中国北京"], "北京中国", 0, 2 * 2 / 8),  # a run of two: order counts
        (["2024年5月"], "2024年", 0, 2 * 2 / 6),  # a number is one
        (["3.5万"], "35万", 0, 2 * 1 / 4),
        (["ABC公司"], "abc公司", 1, 1),
        (["上海", "上海市"], "上海市", 1, 1),
        ([], "", 1, 1),
        ([], "北京", 0, 0),
    ],
)
def test_chinese_answers_are_scored_by_characters(accepted, said, exact, overlap):
    found = spans.scored(accepted, "zh", said)
    assert (found["exact"], found["overlap"]) == (exact, pytest.approx(overlap))


def test_longest_run_equals_brute_force():
    for a, b in itertools.product(
        ["".join(one) for n in range(1, 5) for one in itertools.product("人口", repeat=n)], repeat=2
    ):
        runs = {b[i:j] for i in range(len(b)) for j in range(i + 1, len(b) + 1)}
        longest = max((len(one) for one in runs if one in a), default=0)
        assert spans.scored([a], "zh", b)["overlap"] == pytest.approx(2 * longest / (len(a) + len(b)))


def test_means_are_over_the_questions_as_they_are_drawn():
    ours = columns([{"exact": 1.0, "overlap": 1.0}, {"exact": 0.0, "overlap": 0.5}])
    weights = np.array([[1.0, 1.0], [0.0, 2.0]])
    assert spans.exact_match(ours, weights).tolist() == [0.5, 0]
    assert spans.answer_f1(ours, weights).tolist() == [0.75, 0.5]
