"""Ask again while a service is away: a database that starts again, a store that is down for a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from stages.runtime.contract import Unavailable

AWAY_S = 300.0
"""How long a service may be away before a run gives up."""
_PAUSE_S = 2.0

T = TypeVar("T")


def patiently(ask: Callable[[], T], *, away_s: float = AWAY_S, say: Callable[[str], None] = lambda _: None) -> T:
    """The answer, asked for until it comes.

    Args:
        ask: what to do; doing it twice must do no harm.
        away_s: how long the service may be away.
        say: who is told, once.

    Raises:
        Unavailable: it stayed away, or Prefect's API refused.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            return ask()
        except (httpx.HTTPError, Unavailable) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if refused or time.monotonic() - began >= away_s:
                raise _spoken(error) from error
            if not told:
                say(f"{error}; it is tried again for up to {away_s:g} s")
                told = True
        time.sleep(_PAUSE_S)


def _spoken(error: Exception) -> Unavailable:
    if isinstance(error, Unavailable):
        return error
    return Unavailable(
        f"Prefect's API does not answer as it should ({str(error)[:400]})",
        remedy="Check the server and PREFECT_API_URL.",
    )
