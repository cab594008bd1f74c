"""The `enginery` command in a real terminal of its own, and every way in which a person or a machine ends it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from stages.runtime.fingerprint import ROOT

_MARK = "ENGINERY_TEST_MARK"


def listening_to_signals() -> None:
    """As a person's shell starts a command: what runs tests in the background may have them ignore some of these."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Command:
    """`enginery ARGUMENTS` as the leader of a session whose terminal is a pseudo-terminal of 24 by 100."""

    def __init__(self, *arguments: object, home: Path, env: dict[str, str] | None = None) -> None:
        self.mark, self.output, self.code = uuid.uuid4().hex, b"", None
        self.began = time.monotonic()
        plain = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm", "HOME": str(home)}
        environment = {**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", _MARK: self.mark, **(env or {})}
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            listening_to_signals()
            os.chdir(home)
            words = [sys.executable, "-m", "flows", *map(str, arguments)]
            os.execve(words[0], words, environment)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

    def read_until(self, moment: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Read what it says, as a terminal does, up to a time by the monotonic clock; whether it has ended by then."""
        while self.code is None and time.monotonic() < moment and not until():
            if self.master >= 0 and select.select([self.master], [], [], 0.02)[0]:
                try:
                    self.output += os.read(self.master, 65536)
                except OSError:  # the other side is closed
                    time.sleep(0.01)
            elif self.master < 0:
                time.sleep(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def end(self, how: str) -> float:
        """End it in one of `WAYS`; seconds until the process was gone, at most 60."""
        began = time.monotonic()
        WAYS[how](self)
        if not self.read_until(began + 60):
            os.kill(self.pid, signal.SIGKILL)
        took = time.monotonic() - began
        if self.master >= 0:
            while select.select([self.master], [], [], 0)[0]:
                try:
                    self.output += os.read(self.master, 65536)
                except OSError:
                    break
            self.close()
        return took

    def close(self) -> None:
        """Close the terminal's window."""
        os.close(self.master)
        self.master = -1

    def left(self) -> list[str]:
        """The processes that it has left behind, by their command lines."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    @property
    def said(self) -> str:
        """What stood in the terminal."""
        return self.output.decode("utf-8", errors="replace")


def _twice(command: Command) -> None:
    os.write(command.master, b"\x03")
    if not command.read_until(time.monotonic() + 0.4):
        os.write(command.master, b"\x03")


WAYS: dict[str, Callable[[Command], object]] = {
    "^C": lambda command: os.write(command.master, b"\x03"),
    "^C ^C": _twice,
    "SIGTERM": lambda command: os.kill(command.pid, signal.SIGTERM),
    "SIGHUP": lambda command: os.kill(command.pid, signal.SIGHUP),
    "closed terminal": lambda command: command.close(),
}
