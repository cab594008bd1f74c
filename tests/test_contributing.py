"""The worked examples of CONTRIBUTING.md, made in one copy of the project and used there."""

import re
import shutil
import subprocess
import sys

import pytest

from stages.runtime.fingerprint import ROOT

TOUCHES = {
    "stage": ["stages/halve.py", "tests/stages/test_halve.py", "stages/__init__.py"],
    "measure": ["stages/measures/entropy.py", "stages/measures/table.py"],
    "store": ["stages/adapters/sqlite_store.py"],
    "backend": ["stages/adapters/reference_backend.py"],
}
TABLES = {"stages/__init__.py": "STAGES = {\n", "stages/measures/table.py": "MEASURES: Mapping[str, Measure] = {\n"}
USED = ["tests/stages/test_halve.py", "tests/contributed.py"]


def examples():
    """What is added -> its blocks as (path, text)."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## Add a (\w+)\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    return {name: re.findall(r"```python\n# (\S+)\n(.*?)```", said, re.DOTALL) for name, said in sections}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with every example added."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("stages", "flows", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for path, text in (block for blocks in examples().values() for block in blocks):
        file, table = root / path, TABLES.get(path)
        if table is None:
            assert not file.exists()
            file.write_text(text)
        else:
            before = file.read_text()
            assert before.count(table) == 1
            file.write_text(before.replace(table, table + text))
    return root


@pytest.fixture(scope="module")
def said(copy, tiny):
    """Each test that ran in the copy, and how it ended; the whole text besides."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--show-capture=no", "-p", "no:cacheprovider", *USED],
        cwd=copy,
        env={"PATH": "/usr/bin:/bin", "ENGINERY_TEST_CACHE": str(tiny.parent), "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    ended = re.findall(r"^(PASSED|FAILED|ERROR) (tests/\S+)", done.stdout, re.MULTILINE)
    return {name: how for how, name in ended}, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", TOUCHES)
def test_adding_takes_as_many_touches_as_are_promised(name):
    assert [path for path, _ in examples()[name]] == TOUCHES[name]


@pytest.mark.parametrize(
    ("name", "where", "least"),
    [
        ("stage", "tests/stages/test_halve.py::test_", 2),
        ("measure", "tests/contributed.py::test_measure_", 1),
        ("store", "tests/contributed.py::test_store_", 1),
        ("backend", "tests/contributed.py::test_backend_", 2),
        ("map", "tests/contributed.py::test_map_", 1),
    ],
)
@pytest.mark.fault
def test_what_was_added_passes_its_tests_in_a_copy(said, name, where, least):
    ended, text = said
    mine = {test: how for test, how in ended.items() if test.startswith(where)}
    assert len(mine) >= least and set(mine.values()) == {"PASSED"}, text


def test_examples_follow_the_style(copy):
    added = [path for paths in TOUCHES.values() for path in paths]
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", *added],
        cwd=copy, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--diff", "--no-cache", *added],
        cwd=copy, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert formatted.returncode == 0, formatted.stdout
