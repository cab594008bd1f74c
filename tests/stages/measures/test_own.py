"""Measures of another package: a real one, installed into a folder of its own."""

import sys

import pytest

from flows.judging.gates import judge
from flows.recipe.check import faults
from flows.recipe.model import Recipe
from flows.recipe.read import load_recipe
from stages.measures import own
from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import fingerprint, first_difference
from stages.validate.params import ValidateParams
from stages.validate.stage import VALIDATE
from tests.flows.judging.test_gates import Gate
from tests.stages.validate.test_questions import asked, items, theirs  # noqa: F401 fixtures

CODE = """
def letters(answer, item):
    return sum(one.isalpha() for one in answer) + (100 if item["ability"] == "odd" else 0)

def nothing(answer, item):
    return float("nan")

def broken(answer, item):
    return item["no such field"]

number = 3
"""
POINTS = """[enginery.measures]
letters = politeness:letters
nothing = politeness:nothing
broken = politeness:broken
number = politeness:number
gone = politeness:gone
lost = politeless:letters
"""


def install(site, code=CODE, version="1.2", name="politeness", points=POINTS):
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(code)
    info = site / f"{name}-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path, monkeypatch):
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    sys.modules.pop("politeness", None)
    own._function.cache_clear()


def test_value_of_each_item_is_in_the_report_and_a_gate_holds_the_mean(site, tiny, items, tmp_path):  # noqa: F811
    report = asked(tmp_path, tiny, items, ValidateParams(own=("letters",)))
    wanted = [
        sum(one.isalpha() for one in document["answer"]) + (100 if item.ability == "odd" else 0)
        for document, item in zip(report["documents"], items, strict=True)
    ]
    assert [one["own.letters"] for one in report["documents"]] == wanted
    assert report["measures"]["own.letters"] == pytest.approx(sum(wanted) / len(wanted))
    assert report["slices"]["odd"]["own.letters"] >= 100 > report["slices"]["even"]["own.letters"]
    halved = [one | {"own.letters": one["own.letters"] / 2} for one in report["documents"]]
    reports = {("dense", "set"): report, ("cpu", "set"): report | {"documents": halved}}
    gates = [
        Gate(measure="own.letters", against=None, value_at_least=sum(wanted) / len(wanted) / 2 - 0.01),
        Gate(measure="own.letters", value_at_least=0.51),
        Gate(measure="own.letters", against=None, slice="even", value_at_most=40),
    ]
    found = judge(gates, reports, {}, {"cpu": "onnxruntime:cpu"}).results
    assert [one.passed for one in found] == [True, False, True]
    assert found[1].measured == pytest.approx(0.5)
    with pytest.raises(StageError, match=r"own: \[politeness\]"):
        judge([Gate(measure="own.politeness")], reports, {}, {"cpu": "onnxruntime:cpu"})


def test_version_and_code_of_the_package_are_what_is_measured(site):
    def work():
        return work_of(VALIDATE, ValidateParams(own=("letters",)), {"model": "a" * 64, "text": "b" * 64})

    first = work()
    assert first.executor["own.letters"].startswith("politeness 1.2 ")
    assert fingerprint(work()) == fingerprint(first)
    install(site, version="1.3")
    assert "own.letters" in first_difference(first, work()) and fingerprint(work()) != fingerprint(first)
    install(site, code=CODE.replace("100", "200"))
    assert work().executor["own.letters"].startswith("politeness 1.2 ") and fingerprint(work()) != fingerprint(first)


def test_executor_with_another_version_measures_nothing(site, seal, store, tiny, items, tmp_path):  # noqa: F811
    from stages.runtime.execute import execute
    from stages.runtime.progress import Silent
    from tests.stages.items.test_stage import jsonl

    text = seal("items", {"source": str(jsonl(tmp_path / "own.jsonl", [one.model_dump() for one in items[:2]]))})
    dense = seal("fetch", {"source": tiny.as_uri()})
    params = ValidateParams(own=("letters",))
    work = work_of(VALIDATE, params, {"model": dense.identity, "text": text.identity})
    install(site, version="1.3")
    with pytest.raises(StageError, match=r"own\.letters"):
        execute(VALIDATE, params, work, store, Silent())


def test_name_that_no_package_has_is_refused_with_those_that_are_there(site):
    for name in ("politness", "letter"):
        with pytest.raises(StageError, match=f"registers a measure '{name}'.*broken, gone, letters"):
            VALIDATE.executed_on(ValidateParams(own=(name,)))
    install(site, name="rudeness", points="[enginery.measures]\nletters = rudeness:letters\n")
    with pytest.raises(StageError, match=r"several packages .* politeness, rudeness"):
        own.identity("letters")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "no finite number for item i"),
        ("broken", "KeyError: 'no such field'"),
        ("number", "is no function"),
        ("gone", "cannot be imported"),
        ("lost", "cannot be imported"),
    ],
)
def test_function_that_measures_nothing_is_refused_by_its_name(site, name, said):
    item = Item(id="i", ability="a", prompt="p", answers=("x",))
    with pytest.raises(StageError, match=said) as caught:
        own.scored([name], "x", item)
    assert repr(name) in caught.value.what
    if name == "lost":
        with pytest.raises(StageError, match="no module politeless"):
            own.identity(name)


def test_text_has_no_measures_of_items(site, tiny, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "test.jsonl").write_text('{"id": "1", "text": "If the object is a class."}\n')
    for params in (ValidateParams(own=("letters",)), ValidateParams(variants=("case",))):
        with pytest.raises(StageError, match="measured of items"):
            VALIDATE.run(params, {"model": tiny, "text": text}, tmp_path, None)


def test_recipe_names_what_is_installed_and_gates_on_what_it_asks_for(site):
    recipe = load_recipe("tiny").model_dump(mode="json", by_alias=True)
    recipe["steps"].append({"name": "asked", "stage": "items", "inputs": {}, "params": {"source": "abilities://"}})
    recipe["judge"] |= {"corpora": [*recipe["judge"]["corpora"], "asked"], "own": ["letters"]}
    gate = {"measure": "own.letters", "corpus": "asked", "value_at_least": 1}
    recipe["gates"].append(gate)
    assert not faults(recipe) and Recipe.model_validate(recipe).judge.own == ["letters"]
    place = ("gates", len(recipe["gates"]) - 1)
    for change, path in (
        ({"measure": "own.words"}, (*place, "measure")),
        ({"corpus": "text"}, (*place, "corpus")),
        ({"measure": "letters"}, (*place, "measure")),
    ):
        (fault,) = faults(recipe | {"gates": [*recipe["gates"][:-1], gate | change]})
        assert fault.path == path, change
    (fault,) = faults(recipe | {"judge": recipe["judge"] | {"own": ["letters", "words"]}})
    assert fault.path == ("judge", "own", 1) and "letters" in fault.text
