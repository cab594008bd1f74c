"""How a command is asked to end, and ends: Ctrl-C, SIGTERM, `enginery cancel`, a terminal that was closed.

The first signal raises KeyboardInterrupt in the main thread, and everything unwinds: children are ended, the record and
MLflow say so. A second one ends the children at once. A thread of its own sees to it that this takes no longer than it
may: an exception may be lost (Python drops what is raised while an object is deleted), a server may not answer, native
code may not come back. When the time is up it ends the process itself.

Signals are not handled again while the process unwinds, so that a second Ctrl-C tears no half-written end apart.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDS_WITHIN_S = 4.5
"""From the first signal to the end of the process; a child has less, see `child_process`."""
SAID = "interrupted: what is sealed stays, and the same command goes on from there\n"
CODE = 130
_AGAIN_S = 0.5
"""So long after a signal the main thread is reminded of it, if it does not unwind by then."""
_LAST_S = 0.4
"""What the last acts may take, since one of them may wait for a lock of the thread that hangs."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Act = Callable[[], object]


class _State:
    """What is known of the process that is asked to end."""

    def __init__(self) -> None:
        self.asked = self.unwinding = False
        self.hurried: list[Act] = []
        self.last: list[Act] = []


_now = _State()


@contextmanager
def handled() -> Iterator[None]:
    """Take the signals that ask a process to end, for as long as the block lasts. In the main thread only.

    A signal that is ignored from the start stays so: `nohup` means SIGHUP, a shell's background job Ctrl-C.
    """
    global _now
    _now = _State()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    taken = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, _asked) for one in taken}
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="interruption", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for one, handler in before.items():
            signal.signal(one, handler)
        os.close(writing)  # the thread reads the end of the pipe, and ends


@contextmanager
def only_stops() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt as often as it comes, and asks for no end, for as long as the block lasts."""
    woken, before = signal.set_wakeup_fd(-1), signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(woken)


def asked() -> bool:
    """Whether the process was asked to end."""
    return _now.asked


def unwinding() -> None:
    """The main thread has heard: from here on signals are counted, not raised."""
    _now.unwinding = True


@contextmanager
def ended_by(*, hurry: Act | None = None, last: Act | None = None) -> Iterator[None]:
    """What to do, in another thread, if the block is to end sooner than it does by itself.

    Args:
        hurry: at a second signal, and when the time is up.
        last: when the time is up, before the process is ended.
    """
    acts = ((_now.hurried, hurry), (_now.last, last))
    for acted, act in acts:
        acted.extend([act] if act else [])
    try:
        yield
    finally:
        for acted, act in acts:
            if act in acted:
                acted.remove(act)


def say(text: str = SAID) -> None:
    """Tell the person, who may be gone."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _asked(_signal: int, _frame: FrameType | None) -> None:
    _now.asked = True
    if not _now.unwinding:
        raise KeyboardInterrupt


def _watch(reading: int) -> None:
    """Wait for the first signal; from then on see to it that the process ends in time."""
    state, main, reminders = _now, threading.main_thread().ident, 0
    try:
        if not os.read(reading, 1):
            return
        deadline = time.monotonic() + ENDS_WITHIN_S
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([reading], [], [], min(left, _AGAIN_S))
            if ready and not os.read(reading, 1):
                return
            if ready and reminders:
                reminders -= 1
            elif ready and state.unwinding:
                _done(state.hurried)
            elif not ready and not state.unwinding and main is not None:
                reminders += 1
                signal.pthread_kill(main, signal.SIGTERM)
        _done([*state.hurried, *state.last], within_s=_LAST_S)
        with suppress(OSError):
            os.write(2, SAID.encode())
        os._exit(CODE)
    finally:
        os.close(reading)


def _done(acts: list[Act], within_s: float = 0.0) -> None:
    """Do each in a thread of its own: one that hangs or breaks keeps no other from being done."""
    threads = [threading.Thread(target=_quietly, args=(act,), daemon=True) for act in list(acts)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _quietly(act: Act) -> None:
    with suppress(Exception):
        act()
