"""A gate on a slice that is not there stops the run as soon as the corpus is, not after everything is made."""

# ruff: noqa: F811 - fixtures that other modules define are imported and then named as arguments

import pytest

from flows.pipeline.slices import check_measured
from flows.recipe.model import Gate
from stages.runtime.contract import StageError
from tests.flows.pipeline.tiny_run import place, sealed  # noqa: F401 - fixtures

GATE = "measure: perplexity, at_most: 9, corpus: text, slice: {}"


@pytest.mark.parametrize(
    ("asked", "remedy"), [("topcs", "Did you mean 'topics'"), ("notes", "leave `slice` out")], ids=["misspelt", "empty"]
)
def test_slice_that_is_not_there_is_refused_before_anything_is_judged(place, asked, remedy):
    place.gates = (GATE.format(asked),)
    with pytest.raises(StageError, match=f"slice '{asked}' of text, which has none .* limit topics.*{remedy}"):
        place.run()
    met = {one["step"] for one in place.record.events() if "step" in one}
    assert "text" in met and not any(name.startswith("validate") for name in met) and not place.promoted


def test_slice_that_is_there_goes_on_to_the_judge(place):
    place.gates = (GATE.format("topics"),)
    with pytest.raises(StageError, match="text has no slice topics"):  # the reports of this made-up judge have none
        place.run()


@pytest.mark.parametrize(
    ("measure", "tasks", "fitting"),
    [
        ("accuracy", {"translate"}, "bleu, chrf"),
        ("spearman", {"retrieval"}, "recall_at_1"),
        ("chrf", {"answers", "translate"}, "repetition"),
    ],
)
def test_gate_on_what_items_are_not_measured_by_is_refused_once_they_are_there(measure, tasks, fitting):
    gate = Gate(measure=measure, against="dense", corpus="mine", at_least=0.9)
    with pytest.raises(StageError, match=f"{measure} of mine, whose items are not measured by it.*limit .*{fitting}"):
        check_measured(gate, "mine", frozenset(tasks))


def test_gate_may_look_at_those_items_that_are_measured_so():
    mixed = frozenset({"answers", "translate"})
    check_measured(Gate(measure="chrf", corpus="mine", worst=True, at_least=9), "mine", mixed)
    check_measured(Gate(measure="chrf", corpus="mine", slice="letters", at_least=9), "mine", mixed)
    check_measured(Gate(measure="leaks", corpus="mine", value_at_most=0), "mine", mixed)
    check_measured(Gate(measure="own.length", corpus="mine", at_least=9), "mine", mixed)
