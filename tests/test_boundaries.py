"""What import-linter cannot say without naming each stage: stages are verbs that know nothing of each other."""

import ast
from pathlib import Path

import pytest

from stages import STAGES
from stages.runtime.fingerprint import ROOT


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


VERBS = {f"stages.{name}" for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_stage_imports_no_other_stage_and_no_flow(name):
    found = imported(ROOT / "stages" / f"{name}.py")
    assert not found & (VERBS - {f"stages.{name}"})
    assert not {one for one in found if one.split(".")[0] in ("flows", "prefect", "mlflow")}


@pytest.mark.parametrize("room", ["runtime", "models", "algorithms", "measures", "serving", "adapters"])
def test_room_below_the_stages_imports_no_stage(room):
    for path in (ROOT / "stages" / room).rglob("*.py"):
        assert not imported(path) & VERBS, path


def test_stage_table_one_file_each_and_no_file_without_a_line():
    files = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "__main__"}
    assert files == set(STAGES)
