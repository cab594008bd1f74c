"""A stage with which children are tried out, and how a child learns of it."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
from pathlib import Path

import psutil

import stages
from stages.runtime.contract import Image, Kind, Location, Params, Stage

STAGE = "made-up"
LINES, FILLING = 400, "x" * 1000
LONG_S = 300
SITE = f"""
import stages
stages.STAGES[{STAGE!r}] = "tests.flows.running.made_up_stages:MADE_UP"
"""


class MadeUpParams(Params):
    """What to do, and the file that says who did it."""

    do: str = "nothing"
    name: str = "one"
    mark: str = Location("")


def hang_in_c() -> None:
    """Hold the GIL for ever, so that no Python code runs in this process, no handler of a signal either.

    A lock that is taken twice: a sleep would end early, and let Python on, when a signal comes.
    """
    lock = ctypes.create_string_buffer(64)  # all zeros: a mutex that is free
    native = ctypes.PyDLL(None)
    native.pthread_mutex_lock(lock)
    native.pthread_mutex_lock(lock)


def run(params, inputs, output, progress):
    """Do what is asked, with a process of its own beside it, which ignores TERM."""
    (output / "text.txt").write_text("made up")
    hearing = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    beside = subprocess.Popen(["sleep", str(LONG_S)])
    signal.signal(signal.SIGTERM, hearing)
    mark(params.mark, f"{os.getpid()} {beside.pid}")
    match params.do:
        case "hold":
            progress.note("holds")
            hang_in_c()
        case "die":
            os._exit(7)
        case "gabble":
            progress.note("begins")
            progress.stream.write("Segmentation fault, it says\n")
            progress.stream.flush()
            hang_in_c()
        case "talk":
            for line in range(LINES):
                progress.note(f"{line} {FILLING}")
                progress.metric("loss", float(line), line)
                for half in (0.25, 0.75):
                    progress.advanced(line + half, LINES)
            progress.advanced(LINES, LINES)
            mark(f"{params.mark}.said", "all")
        case "stay":
            atexit.register(hang_in_c)
    return {"letters": 7.0}


def mark(path: str, text: str) -> None:
    """Write a file that is whole once it stands."""
    Path(f"{path}.part").write_text(text)
    Path(f"{path}.part").rename(path)


MADE_UP = Stage(name=STAGE, params=MadeUpParams, inputs={}, output=Kind.CORPUS, image=Image.BASE, run=run)


def known(folder: Path, monkeypatch) -> None:
    """Let this process and its children know the stage."""
    (folder / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setitem(stages.STAGES, STAGE, "tests.flows.running.made_up_stages:MADE_UP")


def runs(pid: int) -> bool:
    """Whether a process does anything yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
