"""The bench as a person starts it: each technique in processes of its own, on the tiny model."""

import subprocess
import sys

import pytest

from stages.runtime.fingerprint import ROOT
from tests.benchmarks.results import kept


@pytest.mark.service
def test_bench_of_two_techniques_measures_each_in_its_own_process_and_resumes(tiny, tmp_path):
    asked = ["--model", str(tiny), "--windows", "4", "--tokens", "128", "--calibration", "8", "--kl-windows", "2"]
    command = [sys.executable, "-m", "tests.benchmarks", *asked, "--only", "int4,w8a8", "--store", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert first.returncode == 0, first.stderr
    rows = kept(next(tmp_path.rglob("rows.jsonl")))
    assert {*rows} == {"dense", "int4", "w8a8"}
    assert rows["int4"].figures["size_bytes"] < rows["w8a8"].figures["size_bytes"] < rows["dense"].figures["size_bytes"]
    assert rows["int4"].figures["kl"] > rows["w8a8"].figures["kl"] > 0
    assert all(1e8 < rows[name].figures["peak_rss_bytes"] < 4e9 for name in ("int4", "w8a8"))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "int4: started" not in again.stderr
    assert kept(next(tmp_path.rglob("rows.jsonl"))) == rows
