"""Gates on items: right answers by ability, what was lost, and what dense itself does not know."""

import math

import numpy as np
import pytest

from flows.judging.gates import judge
from stages.runtime.contract import StageError
from tests.flows.judging.test_gates import Gate

ABILITIES = ("facts", "grammar", "sums", "logic")
TARGETS = {"cpu": "onnxruntime:cpu"}


def documents(rights, chances=None):
    """Documents of items: {ability: right or wrong of each item}."""
    return [
        {
            "id": f"{ability}-{number:03d}", "slice": ability, "tokens": 9, "prompt_nll": 8 * 3.0,
            "right": right, "chance": (chances or {}).get(ability, 0.0), "answer": f"{right}", "repeated": 0,
        }
        for ability, each in rights.items() for number, right in enumerate(each)
    ]  # fmt: skip


def reports(dense, cpu, chances=None, **changed):
    both = {"dense": documents(dense, chances), "cpu": documents(cpu, chances)}
    about = {"corpus": "c", "items": True, "vocabulary": 50_000} | changed
    return {(name, "abilities"): about | {"documents": found} for name, found in both.items()}


def only(gate, made):
    verdict = judge([gate], made, {}, TARGETS)
    assert len(verdict.results) == 1
    assert verdict.passed == verdict.results[0].passed
    return verdict.results[0]


def some(right, of):
    return [1] * right + [0] * (of - right)


DENSE = {"facts": some(40, 50), "grammar": some(45, 50), "sums": some(30, 50), "logic": some(26, 50)}
CPU = {"facts": some(20, 50), "grammar": some(45, 50), "sums": some(29, 50), "logic": some(24, 50)}
MADE = reports(DENSE, CPU, {"grammar": 0.5, "logic": 0.5})


def test_accuracy_against_dense_is_the_share_of_its_right_answers():
    found = only(Gate(measure="accuracy", value_at_least=0.8), MADE)
    assert found.measured == pytest.approx(118 / 141)
    assert found.low < found.measured < found.high
    assert found.passed and not found.slice


def test_value_is_held_by_what_was_measured_and_the_other_bound_by_its_bad_end():
    at = only(Gate(measure="accuracy", value_at_least=0.1), MADE).measured
    low = only(Gate(measure="accuracy", at_least=0.1), MADE).low
    assert low < at
    between = (low + at) / 2
    assert only(Gate(measure="accuracy", value_at_least=between), MADE).passed
    assert not only(Gate(measure="accuracy", at_least=between), MADE).passed
    both = judge([Gate(measure="accuracy", value_at_least=between, at_least=low - 0.01)], MADE, {}, TARGETS)
    assert both.passed
    assert [one.held for one in both.results] == ["bad end", "value"]


def test_good_end_fails_only_where_the_limit_is_surely_missed():
    at = only(Gate(measure="accuracy", slice="sums", high_at_least=0.1), MADE)
    above, beyond = (at.measured + at.high) / 2, at.high + 0.01
    held = only(Gate(measure="accuracy", slice="sums", high_at_least=above), MADE)
    assert held.passed and f"limit high end at least {above:.4g}"[:24] in held.text
    assert not only(Gate(measure="accuracy", slice="sums", value_at_least=above), MADE).passed
    assert not only(Gate(measure="accuracy", slice="sums", high_at_least=beyond), MADE).passed
    least = only(Gate(measure="flips", low_at_most=0.5), MADE)
    assert least.low < least.measured < least.high
    assert only(Gate(measure="flips", low_at_most=(least.low + least.measured) / 2), MADE).passed
    assert not only(Gate(measure="flips", low_at_most=least.low - 0.01), MADE).passed
    # Of few items a half is no sure loss, of many it is.
    few = reports({"facts": some(6, 20)}, {"facts": some(4, 20)})
    many = reports({"facts": some(60, 200)}, {"facts": some(30, 200)})
    gate = Gate(measure="above_chance", worst=True, high_at_least=0.7)
    assert only(gate, few).passed and not only(gate, many).passed


def test_slice_is_judged_by_its_own_items():
    assert only(Gate(measure="accuracy", slice="facts", value_at_least=0.6), MADE).measured == 0.5
    assert only(Gate(measure="accuracy", slice="grammar", value_at_least=0.9), MADE).measured == 1
    with pytest.raises(StageError, match="no slice history"):
        only(Gate(measure="accuracy", slice="history", value_at_least=0.9), MADE)


def test_worst_slice_must_hold_and_is_named():
    found = only(Gate(measure="accuracy", worst=True, value_at_least=0.7), MADE)
    assert (found.slice, found.measured, found.passed, found.worst) == ("facts", 0.5, False, True)
    assert "worst slice facts" in found.text
    assert only(Gate(measure="accuracy", worst=True, value_at_least=0.5), MADE).passed


def test_slice_in_which_dense_knows_no_more_than_chance_is_left_out_and_said():
    found = only(Gate(measure="above_chance", worst=True, value_at_least=0.4), MADE)
    assert found.slice == "facts"
    assert "no better than chance there: logic" in found.text
    kept = {**CPU, "facts": DENSE["facts"]}
    again = only(Gate(measure="above_chance", worst=True, value_at_least=0.9), reports(DENSE, kept, {"logic": 0.5}))
    assert (again.slice, again.passed) == ("sums", True)


def test_above_chance_is_what_is_left_over_a_guess():
    found = only(Gate(measure="above_chance", slice="grammar", value_at_least=1), reports(
        {"grammar": some(45, 50)}, {"grammar": some(35, 50)}, {"grammar": 0.5}
    ))  # fmt: skip
    assert found.measured == pytest.approx((35 - 25) / (45 - 25))


def test_dense_of_random_weights_makes_the_gate_not_apply_visibly():
    nothing = {name: [0] * 50 for name in ABILITIES}
    surprised = reports(nothing, nothing)
    for made in surprised.values():
        for one in made["documents"]:
            one["prompt_nll"] = 8 * math.log(50_000)
    found = only(Gate(measure="accuracy", value_at_least=0.9), surprised)
    assert (found.passed, found.state) == (True, "not applicable")
    assert "dense answers no better than chance" in found.text


def test_shuffled_labels_fail_though_dense_is_at_chance():
    rng = np.random.default_rng(0)
    shuffled = {name: (rng.random(50) < 0.25).astype(int).tolist() for name in ABILITIES}
    found = only(
        Gate(measure="accuracy", value_at_least=0.9), reports(shuffled, shuffled, dict.fromkeys(ABILITIES, 0.3))
    )
    assert (found.passed, found.state) == (False, "failed")
    assert "look for wrong answers in the set" in found.text
    # A set whose answers are known to be right is too hard for the model then.
    shipped = reports(shuffled, shuffled, dict.fromkeys(ABILITIES, 0.3), shipped=True)
    assert only(Gate(measure="accuracy", value_at_least=0.9), shipped).state == "not applicable"


def test_flips_count_both_ways_and_lost_only_one():
    dense, cpu = {"facts": [1, 1, 0, 0, 1]}, {"facts": [0, 1, 1, 0, 1]}
    made = reports(dense, cpu)
    assert only(Gate(measure="flips", at_most=1), made).measured == pytest.approx(2 / 5)
    assert only(Gate(measure="lost", at_most=1), made).measured == pytest.approx(1 / 5)
    assert only(Gate(measure="same_answers", at_least=0), made).measured == pytest.approx(3 / 5)
    with pytest.raises(StageError, match="between two"):
        only(Gate(measure="flips", against=None, at_most=1), made)


def test_same_beginning_is_the_share_of_tokens_before_the_first_that_differs():
    rights = {"facts": [1, 1, 0, 0, 0]}
    made = reports(rights, rights)
    said = {"dense": ("5 6 7 8", "5 6", "3", "", ""), "cpu": ("5 6 9 8 1", "5 6 7", "4", "1 2", "")}
    for name, each in said.items():
        for one, tokens in zip(made[name, "abilities"]["documents"], each, strict=True):
            one["said"] = tokens
    gate = Gate(measure="same_beginning", at_least=0)
    # 2 of 4, all of 2, none of 1; of two answers one has no token, and then both.
    assert only(gate, made).measured == pytest.approx((0.5 + 1 + 0 + 0 + 1) / 5)
    del made["dense", "abilities"]["documents"][0]["said"]
    with pytest.raises(StageError, match=r"no 'said'.*Gate on what such items are measured by"):
        only(gate, made)


def test_what_dense_does_not_do_is_counted_item_by_item():
    dense, cpu = {"facts": [1, 1, 0, 0, 1]}, {"facts": [1, 1, 1, 0, 0]}
    made = reports(dense, cpu)
    told = {"repeated": ([0, 1, 0, 0, 1], [1, 1, 1, 0, 0]), "ended": ([1, 1, 1, 0, 1], [0, 1, 0, 0, 1])}
    told["spelt"] = ([1, 0, 1, 1, 1], [0, 0, 0, 1, 0])
    for key, both in told.items():
        for name, values in zip(("dense", "cpu"), both, strict=True):
            for one, value in zip(made[name, "abilities"]["documents"], values, strict=True):
                one[key] = value
    for measure, share in {"repeating": 2 / 5, "endless": 2 / 5, "respelt": 1 / 5}.items():
        assert only(Gate(measure=measure, at_most=1), made).measured == pytest.approx(share)
        assert only(Gate(measure=measure, worst=True, value_at_most=share - 0.01), made).slice == "facts"
    with pytest.raises(StageError, match="has no 'ended'"):
        only(Gate(measure="endless", at_most=1), reports(dense, cpu))


def test_model_against_itself_passes_every_gate():
    made = reports(DENSE, DENSE, {"grammar": 0.5})
    for gate in (
        Gate(measure="accuracy", at_least=1, value_at_least=1),
        Gate(measure="above_chance", worst=True, at_least=1),
        Gate(measure="flips", at_most=0),
        Gate(measure="same_answers", at_least=1),
    ):
        assert judge([gate], made, {}, TARGETS).passed


def test_other_items_cannot_be_paired():
    made = reports(DENSE, CPU)
    made["cpu", "abilities"]["documents"][3]["id"] = "facts-xxx"
    with pytest.raises(StageError, match="cannot be paired"):
        only(Gate(measure="accuracy", value_at_least=0.9), made)


def test_items_longer_than_the_engine_reads_are_left_out_and_said_and_not_too_many_of_them():
    made = reports(DENSE, CPU)
    for report in made.values():
        for one in report["documents"]:
            one["id"] += "-0123456789ab"
    short = made["cpu", "abilities"]
    short["left_out"] = [f"facts-{number:03d}" for number in range(20)]
    short["documents"] = short["documents"][20:]
    gate = Gate(measure="accuracy", value_at_least=0.5)
    one = only(gate, made)
    # Of dense's 141 right answers and the engine's 118 the first 20 facts are looked at in neither.
    assert one.passed and one.measured == pytest.approx(98 / 121)
    assert "20 of 200 items are longer than one of both reads: facts-000 is the first" in one.text
    short["left_out"].append("facts-020")
    short["documents"] = short["documents"][1:]
    with pytest.raises(StageError, match=r"21 of 200 items .* limit 10% .* larger `maximum_tokens`"):
        only(gate, made)


def test_gate_without_a_corpus_applies_where_its_measure_is():
    text = {"documents": [{"id": f"t{n}", "tokens": 10, "nll": 30.0 + n} for n in range(9)], "corpus": "t"}
    made = MADE | {("cpu", "text"): text, ("dense", "text"): text}
    assert [one.corpus for one in judge([Gate(at_most=2)], made, {}, TARGETS).results] == ["text"]
    gate = Gate(measure="accuracy", value_at_least=0.1)
    assert [one.corpus for one in judge([gate], made, {}, TARGETS).results] == ["abilities"]


def ratio_trials(trials, items, seed):
    """How often the interval of a ratio of right answers holds the true one, of models that lose 8 of 100 and win 2."""
    rng, inside = np.random.default_rng(seed), 0
    known, lost, won = 0.7, 0.08, 0.02
    truth = (known * (1 - lost) + (1 - known) * won) / known
    for _ in range(trials):
        dense = (rng.random(items) < known).astype(int)
        flip = rng.random(items) < np.where(dense == 1, lost, won)
        made = reports({"facts": dense.tolist()}, {"facts": np.where(flip, 1 - dense, dense).tolist()})
        found = only(Gate(measure="accuracy", at_least=0), made)
        inside += found.low <= truth <= found.high
    return inside / trials


def test_interval_of_a_ratio_of_answers_covers_the_truth_as_often_as_it_says():
    assert 0.90 <= ratio_trials(100, 300, 3) <= 0.99


@pytest.mark.fault
def test_interval_of_a_ratio_of_answers_covers_the_truth_in_a_thousand_trials():
    assert 0.93 <= ratio_trials(1000, 400, 5) <= 0.97


def typed_otherwise(rights):
    """Documents of items: {ability: [(right as written, right of each variant)]}."""
    made = documents({ability: [right for right, _ in each] for ability, each in rights.items()})
    variants = [others for each in rights.values() for _, others in each]
    return [
        one
        | {
            "varied": len(others),
            "varied_right": sum(others),
            "varied_flipped": sum(other != one["right"] for other in others),
        }
        for one, others in zip(made, variants, strict=True)
    ]


def test_gate_holds_robustness_of_the_worst_ability_and_says_where_nothing_can_be_kept():
    rights = {
        "facts": [(1, (1, 0))] * 30 + [(0, (0, 0))] * 10,
        "sums": [(1, (1, 1))] * 20,
        "logic": [(1, ())] * 20,
    }
    made = {("cpu", "abilities"): {"items": True, "corpus": "c", "documents": typed_otherwise(rights)}}
    whole = only(Gate(measure="robustness", against=None, value_at_least=0.7), made)
    assert (whole.measured, whole.passed) == (pytest.approx(70 / 100), True)
    worst = only(Gate(measure="robustness", against=None, worst=True, value_at_least=0.6), made)
    assert (worst.slice, worst.measured, worst.passed) == ("facts", pytest.approx(0.5), False)
    assert "logic" in worst.text and "typed otherwise" in worst.text
    flips = only(Gate(measure="variant_flips", against=None, value_at_most=0.25), made)
    assert flips.measured == pytest.approx(30 / 120) and flips.passed
    nothing = {("cpu", "abilities"): {"items": True, "corpus": "c", "documents": typed_otherwise({"a": [(0, (0,))]})}}
    assert not only(Gate(measure="robustness", against=None, worst=True, value_at_least=0.1), nothing).passed


def test_gate_on_robustness_without_variants_says_what_is_missing():
    with pytest.raises(StageError, match="variants: "):
        only(Gate(measure="robustness", value_at_least=0.9), MADE)


def pairs(noise):
    """Documents of pairs of texts, as near as people find them, give or take."""
    rng = np.random.default_rng(3)
    return [
        {"id": f"p{n:03d}", "slice": "near", "tokens": 4, "gold": float(n % 6), "similarity": n % 6 + noise * draw}
        for n, draw in enumerate(rng.normal(0, 1, 120))
    ]


def test_gate_holds_a_rank_correlation_against_dense_unless_dense_finds_nothing_near():
    about = {"items": True, "corpus": "c"}
    made = {(name, "pairs"): about | {"documents": pairs(noise)} for name, noise in (("dense", 0.5), ("cpu", 1.0))}
    found = only(Gate(measure="spearman", value_at_least=0.8), made)
    gate = Gate(measure="spearman", against=None, at_least=0)
    alone = {name: only(gate, {("cpu", "pairs"): made[name, "pairs"]}) for name in ("dense", "cpu")}
    assert found.measured == pytest.approx(alone["cpu"].measured / alone["dense"].measured)
    assert 0.8 < found.measured < 1 and found.low < found.measured < found.high
    lost = made | {("dense", "pairs"): about | {"documents": pairs(1e4)}}
    assert not only(Gate(measure="spearman", value_at_least=0.8), lost).passed


def graded(matches, slice_name="news"):
    """Documents of translations: matches of one to four words of eight."""
    return [
        {"id": f"{slice_name}-{n:03d}", "slice": slice_name, "tokens": 9, "answer": f"{match}", "repeated": 0,
         "bleu": [8, 8, match, max(match - 1, 0), max(match - 2, 0), max(match - 3, 0), 8, 7, 6, 5]}
        for n, match in enumerate(matches)
    ]  # fmt: skip


def both(dense, cpu):
    about = {"corpus": "c", "items": True, "task": "translate", "measures": {}}
    return {("dense", "wmt"): about | {"documents": dense}, ("cpu", "wmt"): about | {"documents": cpu}}


def test_bleu_against_dense_is_the_ratio_of_corpora_with_its_interval():
    made = both(graded([8, 7, 6, 8] * 20), graded([7, 6, 6, 8] * 20))
    found = only(Gate(measure="bleu", value_at_least=0.7), made)

    def corpus(matches):
        precisions = [sum(m - k for m in matches) / (len(matches) * (8 - k)) for k in range(4)]
        return math.prod(precisions) ** 0.25

    assert found.measured == pytest.approx(corpus([7, 6, 6, 8]) / corpus([8, 7, 6, 8]))
    assert found.passed and found.low < found.measured < found.high < 1
    alone = only(Gate(measure="bleu", against=None, value_at_least=50), made)
    assert alone.measured == pytest.approx(100 * corpus([7, 6, 6, 8]))


def test_interval_of_bleu_is_that_of_drawn_documents():
    matches, drawn = [8, 7, 4, 5, 6, 8, 3, 7, 5, 6], np.random.default_rng(0)
    found = only(Gate(measure="bleu", against=None, value_at_least=1), both(graded(matches), graded(matches)))
    values = []
    for _ in range(4000):
        some = drawn.choice(matches, len(matches))
        values.append(100 * math.prod(sum(max(m - k, 0) for m in some) / (10 * (8 - k)) for k in range(4)) ** 0.25)
    low, high = np.quantile(values, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=6) and found.high == pytest.approx(high, abs=6)
    assert found.low < low and found.high > high, "few documents, wide tails"


@pytest.mark.parametrize("measure", ["accuracy", "flips", "lost", "above_chance"])
def test_gate_on_right_answers_of_translations_says_what_they_are_measured_by(measure):
    made = both(graded([8, 7]), graded([8, 7]))
    with pytest.raises(StageError, match="no 'right'") as caught:
        judge([Gate(measure=measure, corpus="wmt", at_most=1)], made, {}, TARGETS)
    assert "bleu" in str(caught.value) and "2 of 2" in str(caught.value)
    with pytest.raises(StageError, match="applies to nothing"):
        judge([Gate(measure=measure, at_most=1)], made, {}, TARGETS)


def test_gate_without_a_corpus_is_on_the_sets_that_have_its_measure():
    made = MADE | both(graded([8, 7]), graded([8, 7]))
    assert [one.corpus for one in judge([Gate(measure="bleu", at_least=0.5)], made, {}, TARGETS).results] == ["wmt"]
    (one,) = judge([Gate(measure="accuracy", value_at_least=0.5)], made, {}, TARGETS).results
    assert one.corpus == "abilities"


def test_worst_slice_is_one_of_those_that_have_the_measure():
    mixed = both([*graded([8, 8]), *documents(DENSE)], [*graded([8, 8]), *documents(CPU)])
    assert only(Gate(measure="accuracy", worst=True, value_at_least=0.1), mixed).slice == "facts"
    assert only(Gate(measure="bleu", worst=True, value_at_least=0.1), mixed).slice == "news"
    assert only(Gate(measure="bleu", slice="news", value_at_least=0.1), mixed).measured == pytest.approx(1)
    with pytest.raises(StageError, match=r"no 'bleu'.*200 of 202"):
        only(Gate(measure="bleu", value_at_least=0.1), mixed)
    with pytest.raises(StageError, match="no 'bleu'"):
        only(Gate(measure="bleu", slice="facts", value_at_least=0.1), mixed)


def test_dense_without_a_match_is_told_and_fails_on_a_set_of_ones_own():
    found = only(Gate(measure="bleu", value_at_least=0.9), both(graded([0, 0]), graded([8, 8])))
    assert not found.passed and "dense has no bleu that is surely above 0: look for wrong answers" in found.text


def test_tagger_with_no_whole_sentence_right_has_an_f1_that_is_compared():
    made = {}
    for name, right in (("dense", 3), ("cpu", 2)):
        tags = [{"id": f"{n}", "slice": "x", "tokens": 4, "right": 0, "chance": 0.0, "answer": "O", "repeated": 0,
                 "entities": [right, 4, 4], "tags": [5, 6]} for n in range(30)]  # fmt: skip
        made[name, "conll"] = {"corpus": "c", "items": True, "task": "tag", "documents": tags}
    assert only(Gate(measure="entity_f1", value_at_least=0.5), made).measured == pytest.approx(2 / 3)
