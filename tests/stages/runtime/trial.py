"""Small stages with which the spine is tried out, and a child process that knows them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Location, Params, Stage, StageError

ROOT = Path(__file__).parents[3]


class TrialParams(Params):
    text: str = "hello"
    number: int = 3
    kilobytes: int = 0
    log: str = Location("")
    gate: str = Location("")
    say: str = Location("")


def run(params, inputs, output, progress):
    """Write a text; log the process that ran; wait until the file `gate` stands, counting in the partial state."""
    if params.log:
        with Path(params.log).open("a") as log:
            log.write(f"{os.getpid()}\n")
    if params.say == "error":
        raise StageError("the trial failed", measured=1, limit=2, remedy="Try another.")
    if params.say == "noise":
        sys.stdout.write("noise on stdout\n")
        os.write(1, b"more noise\n")
    (output / "text.txt").write_text(params.text * params.number)
    (output / "deep").mkdir()
    (output / "deep" / "zeros").write_bytes(bytes(1000 * params.kilobytes))
    counter = output / PARTIAL / "count"
    count = int(counter.read_text()) if counter.is_file() else 0
    progress.note(f"starts at {count}")
    while params.gate and not Path(params.gate).exists():
        count += 1
        counter.write_text(str(count))
        progress.advanced(count, count + 1)
        time.sleep(0.02)
    if params.say == "state":
        counter.write_text("7")
        raise StageError("interrupted by itself")
    progress.metric("loss", 0.5, count)
    return {"letters": float(len(params.text * params.number))}


TRIAL = Stage(
    name="trial",
    params=TrialParams,
    inputs={
        "text": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
        "more": Input(kinds=frozenset({Kind.CORPUS, Kind.REPORT}), optional=True, many=True),
    },
    output=Kind.CORPUS,
    image=Image.BASE,
    run=run,
)

CHILD = """
import sys, stages
stages.STAGES["trial"] = "tests.stages.runtime.trial:TRIAL"
from stages.__main__ import main
sys.exit(main())
"""


def start(folder: Path, order: Path, *, name: str = "trial", orphan: bool = False) -> subprocess.Popen[str]:
    """The child of `python -m stages`, with the trial stage in its table."""
    arguments = [name, "--work", str(order), "--store", str(folder / "store"), "--scratch", str(folder / "scratch")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments, *(["--orphan"] if orphan else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
