"""Every technique is killed in the middle, started again, and ends in the bytes of a run that nothing disturbed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.contract import PARTIAL

pytestmark = pytest.mark.fault

SHORT = {"windows": 4, "window_tokens": 128}
ROOT = Path(__file__).parents[2]
CASES = {
    "int4": ("quantize", {"scheme": "int4_weight_only", "block": 8} | SHORT, 0.5),
    "int8": ("quantize", {"scheme": "int8_w8a8"} | SHORT, 0.5),
    "2:4": ("prune", {"method": "sparsegpt", "pattern": "2:4"} | SHORT, 0.5),
    "channels": ("prune", {"method": "channels", "keep": 0.9} | SHORT, 0.5),
    "width": ("prune", {"method": "width", "keep": 0.9} | SHORT, 0.75),
    "blocks": ("prune", {"method": "blocks", "keep": 0.8} | SHORT, 0.3),
    "factorize": ("factorize", {"keep": 0.8} | SHORT, 0.75),
    "factorize sparse": ("factorize", {"keep": 0.8, "sparse": 0.5} | SHORT, 0.75),
    "basis": ("share", {"method": "basis", "keep": 0.85} | SHORT, 0.75),
    "recursive": ("share", {"method": "recursive", "keep": 0.8} | SHORT, 0.75),
}
"""Name -> stage, params, and the share of its work at which it is killed."""


def start(name, params, inputs, output):
    asked = [json.dumps(params), json.dumps({role: str(folder) for role, folder in inputs.items()})]
    command = [sys.executable, "-m", "tests.stages.killable", name, str(output), *asked]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("case", CASES)
def test_killed_in_the_middle_ends_in_the_same_bytes(case, shared_store, tiny, topics, tmp_path):
    name, params, share = CASES[case]
    inputs = {"model": tiny, "text": shared_store.checkout(topics)}
    with start(name, params, inputs, tmp_path / "killed") as first:
        for line in first.stdout:
            done, _, total = line.partition(" of ")
            if total and float(done) / float(total) >= share:
                break
        first.kill()
    assert first.returncode == -9
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    with (
        start(name, params, inputs, tmp_path / "killed") as again,
        start(name, params, inputs, tmp_path / "whole") as o,
    ):
        said = again.communicate()[0]
        o.communicate()
    assert again.returncode == o.returncode == 0
    if case != "blocks":
        assert "goes on after block" in said
    whole, killed = (
        {
            path.relative_to(tmp_path / run): path.read_bytes()
            for path in sorted((tmp_path / run).rglob("*"))
            if path.is_file() and PARTIAL not in path.parts
        }
        for run in ("whole", "killed")
    )
    assert whole == killed
    assert Path("model.safetensors") in whole
