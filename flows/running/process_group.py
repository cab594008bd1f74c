"""A stage's child and what it starts in turn: a session of their own, ended together and within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

GRACE_S = 3.0
"""From TERM to KILL. Python code leaves its state whole in less; native code never hears the TERM."""
_REAPED_S = 1.0
"""After a KILL: only a process that the kernel itself holds takes longer, and nobody can hurry that one."""
_LOOK_S = 0.02


class ProcessGroup:
    """A child that leads a session, so that no terminal's signal reaches it: whoever started it decides.

    Its standard input is its tie to this process: once it closes, the child's own guard ends the group.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], errors: IO[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        self._swept = False
        # A signal's handler may end children while this very thread does.
        self._guard = threading.RLock()

    @property
    def pid(self) -> int:
        """Of the child and of its group."""
        return self._process.pid

    @property
    def said(self) -> IO[bytes]:
        """The child's standard output; whoever reads it closes it."""
        assert self._process.stdout is not None
        return self._process.stdout

    def poll(self) -> int | None:
        """The child's exit code, None while it runs. What it left behind in its group is killed."""
        with self._guard:
            code = self._process.poll()
            if code is not None and not self._swept:
                self._swept = True
                self._send(signal.SIGKILL)
            return code

    def signal(self, number: int) -> None:
        """Send a signal to the group, unless the child has ended: its number may be another's by then."""
        with self._guard:
            if self.poll() is None:
                self._send(number)

    def ended_within(self, seconds: float) -> int | None:
        """Wait for the child's own end; its exit code, None where it did not come."""
        _all_ended([self], seconds)
        return self.poll()

    def close(self) -> None:
        """Let go of the child's standard input."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says so of zombies by the latter
            os.killpg(self.pid, number)


def end(groups: Iterable[ProcessGroup], *, now: bool = False) -> None:
    """End children and all that they started, at once: TERM, the grace, KILL; takes little longer than the grace.

    Several threads may do so at once. An interrupt meanwhile cuts the grace short, and so does another call with `now`.

    Args:
        groups: the children.
        now: leave the grace out.
    """
    ending = list(groups)
    try:
        if not now:
            for group in ending:
                group.signal(signal.SIGTERM)
            _all_ended(ending, GRACE_S)
    finally:
        for group in ending:
            group.signal(signal.SIGKILL)
    _all_ended(ending, _REAPED_S)


def _all_ended(groups: Sequence[ProcessGroup], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any([group.poll() is None for group in groups]) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


@contextmanager
def ended_after(group: ProcessGroup, minutes: float | None) -> Iterator[threading.Event]:
    """End a child that takes longer; the event is set when that was done."""
    late = threading.Event()

    def too_long() -> None:
        late.set()
        end([group])

    timer = threading.Timer(60 * (minutes or 0), too_long)
    if minutes is not None:
        timer.start()
    try:
        yield late
    finally:
        timer.cancel()
