"""The worked example of CONTRIBUTING.md, run in a copy of the project."""

import re
import shutil
import subprocess
import sys

from stages.runtime.fingerprint import ROOT


def test_contributing_added_stage_passes_its_test(tmp_path, tiny):
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert [path for path, _ in blocks] == ["stages/halve.py", "tests/stages/test_halve.py", "stages/__init__.py"]
    for folder in ("stages", "flows", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (_, stage), (_, test), (_, line) = blocks
    (tmp_path / "stages/halve.py").write_text(stage)
    (tmp_path / "tests/stages/test_halve.py").write_text(test)
    table = tmp_path / "stages/__init__.py"
    table.write_text(table.read_text().replace("STAGES = {\n", "STAGES = {\n" + line))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/stages/test_halve.py",
            "tests/test_architecture.py",
        ],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "ENGINERY_TEST_CACHE": str(tiny.parent), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "stages/halve.py", "stages/__init__.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
