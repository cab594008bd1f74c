"""`.ci/run`: every slice runs, none passes without a test, and the last line is the sum."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("real-test", "test", "fault-test", "cases", "engines-test", "service-test", "production-test")
PASSES = "def test_passes(): pass\n"
FAILS = "def test_fails(): assert False\n"
SKIPS = "import pytest\n@pytest.mark.skip\ndef test_skips(): pass\n"
UNCLEAN = "import pytest\n@pytest.fixture\ndef unclean():\n  yield\n  assert False\ndef test_unclean(unclean): pass\n"
UNCLEAN_FAILS = "def test_unclean_fails(unclean): assert False\n"
BROKEN = "import nothing_of_this_name\n"


@cache
def results(source):
    """What pytest ends with on this source, and the results that it writes."""
    with TemporaryDirectory() as folder:
        test, written = Path(folder, "test_it.py"), Path(folder, "it.xml")
        test.write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--junitxml={written}", str(test)]
        shell = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, env=shell)
        return done.returncode, written.read_text()


def ended(folder, name, source):
    """Leaves the results of pytest on this source; what it ended with. Without a source, it was killed."""
    if source is None:
        return 137
    status, written = results(source)
    (folder / f"{name}.xml").write_text(written)
    return status


def counted(folder, *slices):
    said = subprocess.run(
        [sys.executable, ROOT / ".ci" / "count.py", folder, *slices], capture_output=True, text=True, check=False
    )
    assert not said.stderr
    return said.returncode, said.stdout.splitlines()


@pytest.mark.parametrize(
    ("source", "status", "last", "why"),
    [
        (PASSES + SKIPS, 0, "1 passed, 0 failed, 1 skipped", ""),
        (PASSES, 0, "1 passed, 0 failed", ""),
        (PASSES + FAILS, 1, "1 passed, 1 failed", ""),
        (PASSES + UNCLEAN + UNCLEAN_FAILS, 1, "1 passed, 2 failed", ""),
        (BROKEN, 1, "0 passed, 1 failed", ""),
        (SKIPS, 1, "0 passed, 1 failed, 1 skipped", "executed no test"),
        ("", 1, "0 passed, 1 failed", "executed no test"),
        (None, 1, "0 passed, 1 failed", "ended with 137 and left no count of its tests"),
    ],
    ids=["skips-some", "passes", "fails", "cleans-up-badly", "cannot-be-read", "skips-all", "is-empty", "was-killed"],
)
def test_count_of_a_slice_says_what_pytest_did_and_fails_where_nothing_was_executed(
    source, status, last, why, tmp_path
):
    code = ended(tmp_path, "one", source)
    found, lines = counted(tmp_path, f"one:{code}:75")
    assert (found, lines[-1]) == (status, last)
    assert lines[0] == f"one: {last}, in 1 min 15 s{f': {why}' if why else ''}"


def test_count_of_several_slices_is_their_sum_and_one_that_failed_fails_all(tmp_path):
    slices = [
        f"{name}:{ended(tmp_path, name, source)}:1"
        for name, source in {"a": PASSES + SKIPS, "b": FAILS, "c": PASSES}.items()
    ]
    found, lines = counted(tmp_path, *slices)
    assert (found, len(lines), lines[-1]) == (1, 4, "2 passed, 1 failed, 1 skipped")
    found, lines = counted(tmp_path, slices[0], slices[2])
    assert (found, lines[-1]) == (0, "2 passed, 0 failed, 1 skipped")


def test_count_of_a_slice_whose_command_failed_though_its_tests_passed_is_a_failure(tmp_path):
    ended(tmp_path, "test", PASSES)
    found, lines = counted(tmp_path, "test:2:1")
    assert (found, lines[-1]) == (1, "1 passed, 1 failed")
    assert "ended with 2, though no test failed" in lines[0]


@pytest.mark.parametrize(
    ("source", "status"), [(SKIPS, 0), ("", 1), (None, 1), (FAILS, 1)], ids=["skips", "is-empty", "was-killed", "fails"]
)
def test_count_of_an_idle_slice_may_skip_every_test_but_not_lose_them(source, status, tmp_path):
    ended(tmp_path, "real", PASSES)
    code = ended(tmp_path, "production", source)
    assert counted(tmp_path, "real:0:1", f"production:{code}:1:idle")[0] == status


@pytest.fixture
def project(tmp_path):
    """The script beside a `make` whose tests' results stand ready, and a `docker` of one's choice."""
    folder, tools = tmp_path / "project", tmp_path / "tools"
    shutil.copytree(ROOT / ".ci", folder / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    tools.mkdir()
    others = tmp_path / "others"  # what a machine has besides: all but a browser, and nothing that installs one
    others.mkdir()
    for name in ("bash", "cat", "cp", "dirname", "env", "mktemp", "rm", "sh", "grep"):
        (others / name).symlink_to(shutil.which(name))

    def tool(name: str, does: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)

    def run(engine: bool, check: int = 0, browser: bool = True, minutes: str = "", **sources: str):
        makes = f'echo "makes $2"\n[ "$2" != check ] || exit {check}\n[ -e "$2.xml" ] || exit 0\n'
        tool("make", makes + 'cp "$2.xml" "${3#ARGS=--junitxml=}"\nexit "$(cat "$2.status")"')
        tool("docker", "echo 28.0" if engine else "exit 1")
        tool("id", "echo 0")
        tool("apt-get", 'echo "$@" >> apt')
        for name in ("chromium", "chromedriver") if browser else ():
            tool(name, "exit 0")
        for name in TARGETS:
            status = ended(folder, name, sources.get(name.partition("-")[0], PASSES))
            (folder / f"{name}.status").write_text(str(status))
        shell = {**os.environ, "PATH": f"{tools}:{others}", "PYTHON": sys.executable, "ENGINERY_CI_MINUTES": minutes}
        done = subprocess.run(
            [folder / ".ci" / "run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=shell,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()

    return run


def test_run_in_which_all_passes_ends_with_the_sum_alone(project):
    status, lines = project(engine=True)
    assert (status, lines[-1]) == (0, "7 passed, 0 failed")
    assert [line.split(":")[0] for line in lines[-8:-1]] == [
        "real",
        "test",
        "faults",
        "cases",
        "engines",
        "services",
        "production",
    ]


def test_run_in_which_a_slice_fails_runs_the_others_and_fails(project):
    status, lines = project(engine=True, real=FAILS, test="")
    assert (status, lines[-1]) == (1, "5 passed, 2 failed")
    assert "makes production-test" in lines


def test_run_that_has_no_time_left_says_which_slices_it_leaves_out(project):
    status, lines = project(engine=True, minutes="10")
    assert (status, lines[-1]) == (0, "6 passed, 0 failed")
    told = "== production: not run: 0 of 10 minutes are gone, and it takes about 14; make production-test runs it"
    assert told in lines and "not run for want of time: production" in lines
    assert "makes production-test" not in lines and "makes service-test" in lines


def test_run_with_an_engine_fails_where_production_skips_and_without_one_says_that_it_skipped(project):
    assert project(engine=True, production=SKIPS)[1][-1] == "6 passed, 1 failed, 1 skipped"
    status, lines = project(engine=False, production=SKIPS)
    assert (status, lines[-1]) == (0, "6 passed, 0 failed, 1 skipped")


def test_run_where_no_browser_is_installs_one_and_where_one_is_nothing(project, tmp_path):
    asked = tmp_path / "project" / "apt"
    status, lines = project(engine=True, browser=False)
    assert status == 0 and "== install Chromium" in lines
    assert asked.read_text() == "install -y --no-install-recommends chromium chromium-driver\n"
    asked.unlink()
    assert project(engine=True)[0] == 0 and not asked.exists()


def test_run_has_a_slice_for_every_mark_of_the_tests_but_those_that_need_a_gpu():
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    targets = {found[1] for one in marks if (found := re.search(r"run by `make ([a-z-]+)`", one))}
    assert len(targets) == len(marks)
    run = (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"^slice \w+ (\S+)", run, re.MULTILINE)) == (targets - {"gpu-test"}) | {"test"} == {*TARGETS}


def test_run_whose_check_fails_ends_at_once(project):
    status, lines = project(engine=True, check=2)
    assert status == 2
    assert lines[-1] == "makes check"
