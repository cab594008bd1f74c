"""A folder in which a user works: recipes are written there, and the command runs there, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RAW = re.compile(r"Traceback \(most recent call last\)|\b[A-Z]\w*(?:Error|Exception)\b")
"""What no user may read: a traceback, or the name of an exception."""
AT_ONCE_S = 5.0
"""Within which a refusal must come, in seconds of processors: other work on the machine does not count."""
FIRST_S = 10.0
"""The same where a run has begun, beside which a store's first run makes MLflow's database: about 4 s."""
SPLITS = "splits: {calibrate: 0.3, train: 0.3, test: 0.4}"
WINDOWS = "windows: 4, window_tokens: 64"


@dataclass(frozen=True)
class Said:
    """What a command came to; `busy_s` are seconds of processors of it and its children."""

    code: int
    out: str
    err: str
    busy_s: float

    @property
    def text(self) -> str:
        """All that a user reads."""
        return self.out + self.err


@dataclass(frozen=True)
class Result:
    """What a run says with --json."""

    data: dict[str, Any]
    said: Said

    def step(self, name: str) -> dict[str, Any]:
        """A step, or a measurement, by its name."""
        return next(step for step in self.data["steps"] if step["name"] == name)

    def measured(self, measure: str, artifact: str, corpus: str = "text") -> float:
        """A measure of an artifact on a corpus."""
        return float(self.step(f"validate-{artifact}-{corpus}")["metrics"][measure])

    def folder(self, name: str) -> Path:
        """Where a judged artifact lies."""
        return Path(self.data["outputs"][name])


@dataclass(frozen=True)
class Place:
    """Where one case works."""

    folder: Path

    def start(self, *words: str | Path, launcher: str = "process", log: Path | None = None) -> subprocess.Popen[str]:
        """Begin a command in this folder; steps run in children of their own, or `inline` to be quick."""
        given = {"ENGINERY_LAUNCHER": launcher, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        ours = {"ENGINERY_STORE": str(self.folder / "store"), "COLUMNS": "200"}
        others = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_", "COVERAGE_"))}
        with (log or Path(os.devnull)).open("w") as written:
            to = written if log else subprocess.PIPE
            return subprocess.Popen(
                [sys.executable, "-m", "flows", *map(str, words)],
                cwd=self.folder,
                env=others | given | ours,
                stdout=to,
                stderr=to,
                text=True,
            )

    def enginery(self, *words: str | Path, launcher: str = "inline") -> Said:
        """Run a command to its end; whatever it comes to, no exception shows."""
        before = _busy_s()
        command = self.start(*words, launcher=launcher)
        out, err = command.communicate(timeout=580)
        return checked(Said(command.returncode, out, err, _busy_s() - before))

    def recipe(self, name: str, steps: str, judge: str = "", more: str = "") -> Path:
        """Write a recipe: one step a line, `NAME STAGE ROLE=STEP ... {params}`."""
        lines = [_step(line.strip()) for line in steps.strip().splitlines()]
        judged = f"judge: {{baseline: dense, trace: false, {judge}}}\n" if judge else ""
        path = self.folder / f"{name}.yaml"
        path.write_text(f"recipe: 1\nname: case\nsteps:\n{''.join(lines)}{judged}{more}\n", encoding="utf-8")
        return path

    def run(self, recipe: Path, *words: str | Path, launcher: str = "inline") -> Result:
        """Run a recipe that must hold."""
        return held(self.enginery("run", recipe, "--json", *words, launcher=launcher))

    def quantized(self, params: str, model: str = "in/model", baseline: str | None = None, name: str = "r") -> Result:
        """Quantize a checkpoint and judge it against itself, or against another that must be the same model."""
        other = f"dense fetch {{source: {baseline}}}\n" if baseline else ""
        steps = f"""{other}{"given" if baseline else "dense"} fetch {{source: {model}}}
        text corpus {{source: in/text.txt, {SPLITS}}}
        q quantize model={"given" if baseline else "dense"} text=text {{{params}}}"""
        return self.run(self.recipe(name, steps, judge("q")))

    def refused(self, *words: str | Path, within_s: float = AT_ONCE_S) -> str:
        """What a command says that must be refused, at once and in one place."""
        said = self.enginery(*words)
        assert said.code == 1, said.text[-3000:]
        assert said.busy_s < within_s, f"refused after {said.busy_s:.1f} s: {said.err}"
        return said.err


def judge(*artifacts: str, corpora: str = "text", windows: str = "windows: 8, window_tokens: 64") -> str:
    """What a recipe judges."""
    return f"artifacts: [{', '.join(artifacts)}], corpora: [{corpora}], {windows}"


def checked(said: Said) -> Said:
    """Hold that no exception shows."""
    assert not RAW.search(said.text), said.text[-3000:]
    return said


def held(said: Said) -> Result:
    """The result of a run that ended well."""
    assert said.code == 0, said.text[-3000:]
    return Result(json.loads(said.out[said.out.index("{\n") :]), said)


def awaited(found: Any, within_s: float = 300) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def _step(line: str) -> str:
    words, _, params = line.partition(" {")
    name, stage, *roles = words.split()
    inputs = ", ".join(role.replace("=", ": ") for role in roles)
    return f"  - {{name: {name}, stage: {stage}, inputs: {{{inputs}}}, params: {{{params or '}'}}}\n"


def _busy_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
