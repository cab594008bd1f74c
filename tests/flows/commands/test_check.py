"""What `check` says of a checkpoint, in a process of its own as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from tests.benchmarks.families import checkpoint


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return checkpoint("gpt2", tmp_path)


def test_check_says_what_a_checkpoint_is_and_who_takes_it(gpt2, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "flows", "check", str(gpt2), "--json", "--store", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["facts"]["architecture"] == "GPT2LMHeadModel (gpt2)"
    assert (found["facts"]["task"], found["facts"]["reads"]) == ("generate", "64 tokens")
    verbs = {line["does"]: line for line in found["verbs"]}
    assert verbs["judge"]["takes"] and verbs["export"]["takes"] and not verbs["judge"]["why"]
    assert verbs["prune: heads"]["takes"]
    assert not verbs["prune: hidden width"]["takes"] and "gpt2" in verbs["prune: hidden width"]["why"]
    assert "blocks of 64 do not divide" in verbs["quantize: INT4"]["why"]
    assert not (tmp_path / "store").exists()  # a folder is looked at, and nothing is written


def test_check_shows_tables(gpt2, capsys):
    assert main(["check", str(gpt2)]) == 0
    said = capsys.readouterr().out
    assert "GPT2LMHeadModel" in said and "quantize: INT8" in said


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: None, "config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'), "adapter"),
    ],
)
def test_check_says_what_is_no_checkpoint(tmp_path, capsys, made, said):
    folder = tmp_path / "given"
    folder.mkdir()
    made(folder)
    assert main(["check", str(folder)]) == 1
    assert said in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_told_in_a_line(monkeypatch, capsys):
    def broken(_source: str) -> str:
        raise LookupError("no such thing\nsecond line")

    monkeypatch.setattr("flows.commands.check.absolute_source", broken)
    assert main(["check", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: LookupError: no such thing. This is a defect: please report it")
    assert "Traceback" not in said
    assert main(["check", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
