"""Every fault of a recipe is named at once, whatever stands beside it, and nothing that only follows from one."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flows.recipe.check import faults
from flows.recipe.model import Recipe, RecipeError
from flows.recipe.read import load_recipe
from tests.flows.definitions import plain_stages  # noqa: F401
from tests.flows.recipe.test_read import GOOD

pytestmark = pytest.mark.usefixtures("plain_stages")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

MISTAKES = [
    ("recipe: 1", "recipe: 2", "1: recipe"),
    ("name: text, stage", "name: Text!, stage", "5: steps.Text!.name"),
    ("train: 0.7", "train: 7", "5: steps.text.params.splits.train"),
    ('source: "x://y"', 'sauce: "x://y"', "6: steps.other.params.sauce"),
    ("stage: share,", "stage: shear,", "7: steps.shared.stage"),
    ("{keep: 0.9}", "{kept: 0.9}", "7: steps.shared.params.kept"),
    ("model: shared, teacher", "model: dance, teacher", "8: steps.healed.inputs.model"),
    ("tokens: 1e5", "tokens: 1.5", "8: steps.healed.params.tokens"),
    ("model: healed, text", "model: healed, txt", "9: steps.int8.inputs.txt"),
    ("{scheme: int8_w8a8}", "{}", "9: steps.int8.params.scheme"),
    ("name: graph,", "nmae: graph,", "10: steps.6.nmae"),
    ("[sm_89, sm_120]", "[sm_1, sm_2]", "11: steps.gpu.params.architectures"),
    ("name: cpu, stage", "name: gpu, stage", "12: steps.gpu.name"),
    ("[cpu, gpu]", "[cpu, tpu]", "13: judge.artifacts.1"),
    ("baseline: dense", "baseline: graph", "13: judge.baseline"),
    ("[text, other]", "[text, third]", "13: judge.corpora.1"),
    ("measure: perplexity", "measure: speed", "15: gates.0.measure"),
    ("against: dense", "against: nobody", "15: gates.0.against"),
    ("at_most: 1.25", "at_mots: 1.25", "15: gates.0.at_mots"),
    ("artifact: gpu, against", "artifact: text, against", "16: gates.1.artifact"),
    ("against: champion", "against: 7", "16: gates.1.against"),
    ("register: {model", "register: {modell", "17: register.modell"),
]
# What nobody can tell: the params of a stage that is not there, and of two strange names which is the nameless step's.
APART = [
    ("7: steps.shared.stage", "7: steps.shared.params.kept"),
    ("12: steps.gpu.name", "13: judge.artifacts.1"),
    ("12: steps.gpu.name", "15: gates.0.against"),
]


def named(text: str, *sets: str) -> list[str]:
    """Where a recipe is refused, as `line: field`, in the order in which it is said."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, sets)
    return [line.partition("recipe.yaml:")[2].rpartition(": ")[0] or line for line in placed(str(caught.value))]


def placed(said: str) -> list[str]:
    return [(re.match(r".*?recipe\.yaml:\d+: [^ ]+?: ", line) or re.match(".*", line))[0] for line in said.splitlines()]


def spoiled(mistakes) -> tuple[str, set[str]]:
    """A recipe with these mistakes, and where each is."""
    text = GOOD
    for old, new, _ in mistakes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    where = {where for *_, where in mistakes}
    if "5: steps.Text!.name" in where:
        where = {one.replace("steps.text.", "steps.Text!.") for one in where}
    return text, where


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one[2])
def test_one_mistake_is_named_once_and_nothing_that_follows_from_it(mistake):
    text, where = spoiled([mistake])
    assert set(named(text)) == where


@QUICK
@given(st.lists(st.sampled_from(MISTAKES), min_size=2, max_size=12, unique=True))
def test_many_mistakes_are_all_named_in_the_order_of_the_file_and_nothing_else_is(mistakes):
    text, where = spoiled(mistakes)
    assume(not any({one, other} <= {at for *_, at in mistakes} for one, other in APART))
    found = named(text)
    assert set(found) == where
    lines = [int(one.partition(":")[0]) for one in found]
    assert lines == sorted(lines)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(["dense", "text", "gpu", "perplexity", "", "x y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "model", "x"]), inner),
    max_leaves=4,
)


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


@QUICK
@given(st.data())
def test_anything_anywhere_is_refused_in_words_or_is_a_recipe(data):
    recipe = yaml.safe_load(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from([one for one in places(recipe) if one]))
        here = recipe
        for key in path[:-1]:
            here = here[key]
        if data.draw(st.booleans()):
            here[path[-1]] = data.draw(json_values)
        else:
            del here[path[-1]]
    if not faults(recipe):
        Recipe.model_validate_json(json.dumps(recipe), strict=True)


@pytest.mark.parametrize(
    "right, wrong, where",
    [
        ("{scheme: int8_w8a8}", "{scheme: int8_w8a8, keep: 0.7}", "9: steps.int8.params.keep"),
        ("{keep: 0.9}", "{method: [channels]}", "7: steps.shared.params.method"),
    ],
)
def test_wrong_params_of_steps_that_say_how_wide_blocks_are_are_named(right, wrong, where):
    text = GOOD.replace("stage: share,", "stage: prune,").replace(right, wrong)
    assert named(text) == [where]


def test_beams_are_refused_where_nothing_is_answered():
    assert named(GOOD.replace("baseline: dense", "beams: 4, baseline: dense")) == ["13: judge.beams"]


def test_judge_misspelled_is_all_that_is_said_of_what_needs_it():
    assert named(GOOD.replace("judge:", "jugde:")) == ["13: jugde"]


def test_two_faults_of_yaml_hide_none_of_sense():
    text = GOOD.replace("name: small", "name: !secret small").replace("{keep: 0.9}", "{keep: 0.9, keep: 0.8}")
    text = text.replace("model: shared, teacher", "model: dance, teacher").replace("model: small", "modell: small")
    assert named(text) == [
        "2: name",
        "7: steps.shared.params.keep",
        "8: steps.healed.inputs.model",
        "17: register.modell",
    ]


def test_several_architectures_that_cannot_be_are_all_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("[sm_89, sm_120]", "[sm_1, sm_89, sm_2]"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    said = str(caught.value).splitlines()
    assert len(said) == 2 and "'sm_1'" in said[0] and "'sm_2'" in said[1]


def test_settings_that_cannot_be_applied_are_all_named_beside_the_faults_of_the_file():
    text = GOOD.replace("baseline: dense", "baseline: graph").replace("{scheme: int8_w8a8}", "{}")
    found = named(text, "steps.int8.params.shceme=fp8", "stpes.x=1", "judge.slipt=test", "steps.shared.params.keep=9")
    # The first would have mended what int8 lacks, so that nothing is said of that.
    assert [one.partition(":")[0] for one in found[:3]] == [
        f"--set {at}" for at in ("steps.int8.params.shceme", "stpes.x", "judge.slipt")
    ]
    assert found[3:] == ["7: steps.shared.params.keep (--set)", "13: judge.baseline"]
