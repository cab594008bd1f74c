"""Gates that speak of what `judge` does not ask for."""

import pytest

from flows.recipe.check import faults
from flows.recipe.read import load_recipe


@pytest.fixture
def recipe():
    """One that judges a set of items, too, as JSON values."""
    found = load_recipe("tiny").model_dump(mode="json", by_alias=True)
    found["steps"].append({"name": "asked", "stage": "items", "inputs": {}, "params": {"source": "abilities://"}})
    found["judge"]["corpora"].append("asked")
    found["judge"].pop("measures")
    assert not faults(found)
    return found


@pytest.mark.parametrize("measure", ["robustness", "variant_flips"])
def test_gate_on_items_typed_otherwise_needs_the_variants_of_judge(recipe, measure):
    recipe["gates"].append({"measure": measure, "corpus": "asked", "value_at_least": 0.8})
    (fault,) = faults(recipe)
    assert fault.path == ("gates", len(recipe["gates"]) - 1, "measure") and "variants" in fault.text
    recipe["judge"]["variants"] = ["typos"]
    assert not faults(recipe)


FAST = {"measure": "decode_tokens_per_s", "against": "dense", "at_least": 2}


def test_gate_on_a_speed_needs_the_speed_of_judge(recipe):
    recipe["gates"].append(FAST)
    (fault,) = faults(recipe)
    assert fault.path == ("gates", len(recipe["gates"]) - 1, "measure")
    assert "`judge` asks for no speed; allowed: with `speed: true` of `judge`" in fault.text
    recipe["judge"]["speed"] = True
    assert not faults(recipe)
    del recipe["judge"], recipe["register"]
    recipe["gates"] = [FAST]
    assert "with `speed: true` of `judge`" in faults(recipe)[0].text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("against", "champion", "was not measured in turn with it, as decode_tokens_per_s must be; allowed: dense"),
        ("against", "cpu", "was not measured in turn with it"),
        ("artifact", "dense", "is not judged by execution here; allowed: cpu"),
        ("corpus", "text", "a speed has no corpus and no slices"),
        ("slice", "prose", "a speed has no corpus and no slices"),
        ("worst", True, "a speed has no corpus and no slices"),
    ],
)
def test_gate_on_a_speed_is_of_a_judged_artifact_beside_the_baseline_and_of_no_text(recipe, field, value, said):
    recipe["judge"]["speed"] = True
    recipe["gates"].append({**FAST, field: value})
    (fault,) = faults(recipe)
    assert fault.path == ("gates", len(recipe["gates"]) - 1, field) and said in fault.text


@pytest.mark.parametrize(("field", "value"), [("slice", "prose"), ("worst", True)])
def test_gate_on_a_size_has_no_slices(recipe, field, value):
    recipe["gates"].append({"measure": "size_bytes", "artifact": "cpu", "at_most": 1e9, field: value})
    assert any(one.path[-1] == field and "a size has no slices" in one.text for one in faults(recipe))


def test_speed_of_judge_needs_a_text(recipe):
    recipe["judge"] |= {"speed": True, "corpora": ["asked"]}
    recipe["gates"] = [FAST]
    (fault,) = faults(recipe)
    assert fault.path == ("judge", "speed") and "a step of the stage corpus among its corpora" in fault.text


def test_gate_on_a_speed_of_the_baseline_against_itself_is_refused_and_one_of_all_leaves_it_out(recipe):
    recipe["judge"] |= {"speed": True, "artifacts": ["cpu", "dense"]}
    recipe["gates"].append(FAST)
    assert not faults(recipe)
    recipe["gates"][-1] = {**FAST, "artifact": "dense"}
    (fault,) = faults(recipe)
    assert "'dense' takes no turns with itself" in fault.text


@pytest.mark.parametrize("measure", ["perplexity", "flips", "size_bytes"])
def test_gate_on_an_artifact_beside_itself_is_refused(recipe, measure):
    itself = {"measure": measure, "artifact": "cpu", "against": "cpu", "at_most": 1.0}
    recipe["gates"].append(itself)
    (fault,) = faults(recipe)
    assert fault.path == ("gates", len(recipe["gates"]) - 1, "against")
    assert "'cpu' compared with itself holds nothing; allowed: champion, " in fault.text
    recipe["gates"][-1] = {**itself, "against": "champion"}
    assert not faults(recipe)


@pytest.mark.parametrize("measure", ["perplexity", "size_bytes"])
def test_gate_of_every_artifact_against_the_only_one_is_refused_and_beside_another_is_not(recipe, measure):
    recipe["judge"]["artifacts"] = ["cpu"]
    recipe["gates"].append({"measure": measure, "against": "cpu", "at_most": 1.0})
    (fault,) = faults(recipe)
    assert fault.path == ("gates", len(recipe["gates"]) - 1, "against")
    assert "'cpu' compared with itself holds nothing, and no other artifact is judged" in fault.text
    recipe["judge"]["artifacts"] = ["cpu", "int8"]
    assert not faults(recipe)


def test_gate_on_a_speed_of_every_artifact_where_only_the_baseline_is_judged_is_refused(recipe):
    del recipe["register"]
    recipe["judge"] |= {"speed": True, "artifacts": ["dense"]}
    recipe["gates"] = [FAST]
    (fault,) = faults(recipe)
    assert "'dense' takes no turns with itself" in fault.text


@pytest.mark.parametrize(
    "gate",
    [
        {"measure": "size_bytes", "artifact": "dense", "at_most": 1e12},
        {"measure": "size_bytes", "artifact": "gpu", "at_most": 1e12},
        {"measure": "perplexity", "artifact": "int8", "against": "dense", "at_most": 2},
        {"measure": "perplexity", "against": "cpu", "at_most": 2},
        {"measure": "perplexity", "artifact": "cpu", "against": "champion", "at_most": 2},
    ],
)
def test_recipe_that_registers_needs_a_gate_that_speaks_of_the_engine_it_would_serve(recipe, gate):
    recipe["judge"]["artifacts"] = ["int8", "gpu", "cpu"]
    recipe["gates"] = [gate, {"measure": "size_bytes", "artifact": "int8", "at_most": 1e12}]
    (fault,) = faults(recipe)
    assert fault.path == ("gates",) and "'cpu' would be served, and none of the gates without `champion`" in fault.text
    for held in (
        {"measure": "size_bytes", "artifact": "cpu", "at_most": 1e8},
        {"measure": "top1_agreement", "at_least": 0.4},
        {"measure": "perplexity", "artifact": "cpu", "against": "int8", "at_most": 1.1},
    ):
        recipe["gates"][-1] = held
        assert not faults(recipe)
    # A gate that is wrong itself may be the one that was meant.
    recipe["gates"][-1] = {"measure": "perplexity", "artifact": "cqu", "at_most": 2}
    (fault,) = faults(recipe)
    assert fault.path == ("gates", 1, "artifact")
    recipe["gates"].pop()
    del recipe["register"]
    assert gate.get("against") == "champion" or not faults(recipe)
