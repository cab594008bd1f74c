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
