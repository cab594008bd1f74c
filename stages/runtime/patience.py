"""Ask again while a service is away: the one policy of every store, API and database.

An outage has one clock, however many calls lie inside one another: what is asked inside `patiently` waits no longer
than the outermost caller does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from stages.runtime.contract import Interrupted, Unavailable

AWAY_S = 300.0
"""How long a service may be away before a run gives up."""
BRIEFLY_S = 20.0
"""How long it may be away before a command gives up that a person waits for."""
ANSWER_S = 10.0
"""How long one answer may take before it is asked for again."""
LONGEST_PAUSE_S = 10.0

T = TypeVar("T")


@dataclass
class _Outage:
    away_s: float
    stopped: threading.Event | None = None
    until: float | None = None
    """On the monotonic clock; None while all answers come."""

    def failed(self, asked: float) -> float:
        """Until when to wait, as no answer came to what was asked at `asked`.

        What worked for an hour and then broke has its whole patience: only an answer's time is taken off.
        """
        if self.until is None:
            now = time.monotonic()
            self.until = now + self.away_s - min(now - asked, ANSWER_S)
        return self.until

    def check(self) -> None:
        """Raise Interrupted once the waiting was stopped."""
        if self.stopped is not None and self.stopped.is_set():
            raise Interrupted("stopped while it waited for a service that is away")


_OUTAGE: ContextVar[_Outage | None] = ContextVar("outage", default=None)
_of_process_s = BRIEFLY_S


def be_patient(away_s: float = AWAY_S) -> None:
    """From now on this process waits so long for what is away, unless a caller says otherwise: it works for hours."""
    global _of_process_s
    _of_process_s = away_s


def left_s(at_most: float = ANSWER_S) -> float:
    """How long the next answer may take: `at_most`, or what the caller's patience leaves of it."""
    outage = _OUTAGE.get()
    if outage is None:
        return at_most
    # Who does not wait at all for what is away still gives one answer its time.
    left = (outage.away_s or at_most) if outage.until is None else outage.until - time.monotonic()
    return max(0.1, min(at_most, left))


@contextmanager
def waiting(away_s: float, stopped: threading.Event | None = None) -> Iterator[_Outage]:
    """What is asked inside has one clock, which allows `away_s` from the first answer that fails."""
    outer = _OUTAGE.get()
    if outer is None:
        mine = _Outage(away_s, stopped)
    else:
        until = None if outer.until is None else min(outer.until, time.monotonic() + away_s)
        mine = _Outage(min(away_s, outer.away_s), stopped or outer.stopped, until)
    token = _OUTAGE.set(mine)
    try:
        yield mine
    except BaseException:
        if outer is not None and mine.until is not None and outer.until is None:
            outer.until = mine.until + outer.away_s - mine.away_s
        raise
    finally:
        _OUTAGE.reset(token)


class Tolerance:
    """For who asks every second anyway: what is away for a while is asked next time."""

    def __init__(self, away_s: float = AWAY_S) -> None:
        self._outage = _Outage(away_s)

    def ask(self, ask: Callable[[], T]) -> T | None:
        """The answer, None while there is none.

        Raises:
            Unavailable: there has been none for too long.
        """
        asked = time.monotonic()
        with waiting(0.0):
            try:
                found = ask()
            except Unavailable:
                if time.monotonic() >= self._outage.failed(asked):
                    raise
                return None
        self._outage.until = None
        return found


def patiently(
    ask: Callable[[], T],
    *,
    away_s: float | None = None,
    say: Callable[[str], None] = lambda _: None,
    stopped: threading.Event | None = None,
) -> T:
    """The answer, asked for until it comes.

    Args:
        ask: what to do; doing it twice must do no harm.
        away_s: how long the service may be away, by default as long as this process is patient.
        say: who is told, once.
        stopped: ends the waiting at once.

    Raises:
        Unavailable: it stayed away.
        Interrupted: the waiting was stopped.
    """
    with waiting(_of_process_s if away_s is None else away_s, stopped) as outage:
        asked = 0.0

        def once() -> T:
            nonlocal asked
            outage.check()
            asked = time.monotonic()
            return ask()

        def enough(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + state.upcoming_sleep >= outage.failed(asked)

        def tell(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome:
                say(f"{state.outcome.exception()}; it is tried again for up to {outage.away_s:g} s")

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(multiplier=1, max=LONGEST_PAUSE_S, min=0.2),
            stop=enough,
            before_sleep=tell,
            sleep=tenacity.sleep_using_event(outage.stopped) if outage.stopped else time.sleep,
            reraise=True,
        )
        return again(once)
