"""The house is as its map says, and what holds it sees a breach of each kind."""

import ast
import re
import shutil
import tomllib

import pytest

from stages import STAGES
from stages.runtime.fingerprint import ROOT
from tests import architecture
from tests.architecture import (
    LAYERS,
    VERBS,
    breaches,
    circles,
    files,
    in_disguise,
    outside,
    room,
    rooms_without_a_word,
    too_large,
    upward,
)


def test_code_is_as_the_map_has_it():
    assert breaches(files()) == []


def test_stage_table_one_file_or_folder_each_and_none_without_a_line():
    here = ROOT / "stages"
    alone = {path.stem for path in here.glob("*.py")} - {"__init__", "__main__", "admission"}
    folders = {path.parent.name for path in here.glob("*/stage.py")}
    assert not alone & folders and alone | folders == set(STAGES)


def test_every_layer_of_the_map_is_there():
    for line in LAYERS:
        for name in line:
            path = ROOT.joinpath(*name.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_stages_know_neither_flows_nor_prefect_nor_mlflow():
    for name, file in files().items():
        if name.startswith("stages"):
            tops = {one.split(".")[0] for one in architecture.imported(file.tree)}
            assert not tops & {"flows", "prefect", "mlflow"}, name


def test_import_linter_holds_the_same_layers_of_flows():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (held,) = [one for one in contracts if one.get("containers") == ["flows"]]
    mine = [sorted(name.removeprefix("flows.") for name in line) for line in architecture.FLOWS]
    assert [sorted(line.split(" | ")) for line in held["layers"]] == mine and held["exhaustive"]


def test_picture_of_the_house_names_every_room_once():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text[text.index("```text\nflows/") :].partition("```\n")[0]
    # What stands before the first two spaces of a line are rooms; the rest is prose.
    named = [name for line in picture.splitlines() for name in re.findall(r"(\w+)/", line.strip().partition("  ")[0])]
    houses = [name for line in LAYERS for name in line if ROOT.joinpath(*name.split(".")).is_dir()]
    tops = ["flows", "stages", "models", "docker", "infra", "tests"]
    assert sorted(named) == sorted([*tops, *(name.rpartition(".")[2] for name in houses)])


@pytest.fixture
def house(tmp_path):
    """A copy of the code that a test may spoil; reads it again after each change, or not at all."""
    for top in ("flows", "stages"):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__"))

    def spoiled(path, text, read=True):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / path).open("a") as stream:
            stream.write(text)
        return files.__wrapped__(tmp_path) if read else None

    return spoiled


def long(lines):
    return "def long():\n" + "    x = 1\n" * lines


@pytest.mark.parametrize(
    ("path", "text", "check", "said"),
    [
        ("flows/attic/old.py", "A = 1\n", outside, "flows/attic/old.py lies in no room"),
        ("stages/halve.py", "A = 1\n", outside, "stages/halve.py lies in no room"),
        ("flows/recipe/model.py", "import flows.pipeline.optimize\n", upward, "may not know flows.pipeline"),
        ("flows/triggers/watch.py", "import flows.production.deploy\n", upward, "may not know flows.production"),
        ("stages/share.py", "def f():\n    import stages.prune.zeros\n", upward, "may not know stages.prune"),
        ("stages/models/text/windows.py", "import stages.models.anatomy.roles\n", upward, "may not know stages.models"),
        ("stages/runtime/contract.py", "import stages.adapters.s3_store\n", upward, "stages.runtime may not know"),
        ("flows/recipe/model.py", "from ..pipeline import optimize\n", in_disguise, "model.py:"),
        ("stages/share.py", "def f():\n    from .prune import zeros\n", in_disguise, "imports relatively"),
        ("stages/share.py", "def f():\n    from stages import stage\n", in_disguise, "imports the table of stages"),
        ("stages/measures/size.py", "A = 1\n" * 300, too_large, "lines; 300 at most"),
        ("stages/measures/size.py", long(60), too_large, "long has 61 lines; 60 at most"),
        ("stages/measures/size.py", "def f(a, b, c, d, e, f, *, g, h): ...\n", too_large, "f takes 8; 7 at most"),
        ("flows/judging/__init__.py", "from flows.judging.gates import judge\n", rooms_without_a_word, "one docstring"),
    ],
)
def test_breach_of_each_kind_is_seen(house, path, text, check, said):
    assert said in "\n".join(check(house(path, text)))


def test_circle_of_files_is_seen_whole(house):
    house("flows/reporting/format.py", "import flows.reporting.tables\n", read=False)
    found = house("flows/reporting/tables.py", "def late():\n    import flows.reporting.format\n")
    # Tables are written by what writes steps' times, which knows the format as well.
    assert ["flows.reporting.format", "flows.reporting.tables", "flows.reporting.timed_steps"] in circles(found)


def test_room_of_more_than_twenty_files_is_seen_but_for_techniques(house):
    for number in range(21):
        house(f"stages/algorithms/technique_{number}.py", "A = 1\n", read=False)
        house(f"stages/serving/backend_{number}.py", "A = 1\n", read=False)
    found = house("stages/serving/backend_0.py", "")
    said = "\n".join(too_large(found))
    assert re.search(r"stages.serving has \d+ files; 20 at most", said) and "stages.algorithms has" not in said


def test_command_may_have_as_many_parameters_as_options_and_a_method_its_own_object(house):
    many = "def f(a, b, c, d, e, f, g, h): ...\n"
    method = "class A:\n    def f(self, a, b, c, d, e, f, g): ...\n"
    before = list(too_large(house("flows/judging/gates.py", "")))
    house("flows/commands/run.py", many, read=False)
    assert list(too_large(house("flows/judging/gates.py", method))) == before


def test_map_is_printed_with_its_figures(capsys):
    assert architecture.main([]) == 0
    said = capsys.readouterr().out
    assert "flows.pipeline" in said and "0 circles, 0 arrows up" in said
    assert architecture.main(["a room is on fire"]) == 1 and "breach: a room is on fire" in capsys.readouterr().out
    assert set(VERBS) == {f"stages.{name}" for name in STAGES}
    assert room("stages.models.layers.low_rank_linear") == "stages.models.layers" and room("elsewhere") is None
    assert architecture.parameters(ast.parse("def f(self, a, /, *b, c, **d): ...").body[0]) == 4
