"""Ask again while a service is away: a database that starts again, a store that is down for a minute.

The policy is the stages' own, `stages.runtime.patience`; here it knows Prefect's API, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import httpx

from stages.runtime import patience
from stages.runtime.contract import StageError, Unavailable
from stages.runtime.patience import ANSWER_S

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

AWAY_S = patience.AWAY_S

T = TypeVar("T")


def patiently(
    ask: Callable[[], T],
    *,
    away_s: float = AWAY_S,
    say: Callable[[str], None] = lambda _: None,
    stopped: threading.Event | None = None,
) -> T:
    """The answer, asked for until it comes.

    Args:
        ask: what to do; doing it twice must do no harm.
        away_s: how long the service may be away, from the first answer that fails. Inside another `patiently` it is
            one outage with one clock.
        say: who is told, once.
        stopped: ends the waiting at once.

    Raises:
        Unavailable: it stayed away.
        StageError: Prefect's API refused.
        Interrupted: the waiting was stopped.
    """

    def once() -> T:
        with answered():
            return ask()

    return patience.patiently(once, away_s=away_s, say=say, stopped=stopped)


@contextmanager
def api(answer_s: float = ANSWER_S) -> Iterator[SyncPrefectClient]:
    """A client of Prefect's API that asks once and gives up in time: who is patient decides what is asked again.

    Prefect's own functions use such a client inside, too. Theirs would sleep 2, 4, 8, ... s between tries of a minute.
    """
    from prefect.context import SyncClientContext
    from prefect.settings import (
        PREFECT_API_REQUEST_TIMEOUT,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
        temporary_settings,
    )

    def limited(request: httpx.Request) -> None:
        left = patience.left_s(answer_s)
        request.extensions["timeout"] = httpx.Timeout(left).as_dict()

    asked_once = {
        PREFECT_CLIENT_MAX_RETRIES: 0,
        PREFECT_API_REQUEST_TIMEOUT: patience.left_s(answer_s),
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,
    }
    with temporary_settings(asked_once), SyncClientContext({"event_hooks": {"request": [limited]}}) as opened:
        yield opened.client


def await_api(flow_run: str) -> None:
    """Wait for an API that is away: Prefect tells it the flow run's end next, and gives up after some seconds.

    Where it stays away nothing is lost: the store has heard already how the work ended.
    """
    with suppress(Unavailable), api() as client:
        patiently(lambda: client.read_flow_run(UUID(flow_run)))


@contextmanager
def answered() -> Iterator[None]:
    """The Prefect server's errors as ours: Unavailable where another try may help."""
    where = os.environ.get("PREFECT_API_URL", "")
    try:
        yield
    except httpx.RequestError as error:
        raise Unavailable(
            f"no Prefect server answers at {where}",
            measured=type(error).__name__,
            remedy="Start it, or unset PREFECT_API_URL to work without one.",
        ) from error
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status >= 500 or status in (408, 429):
            raise Unavailable(f"the Prefect server at {where} failed", measured=f"HTTP {status}") from error
        raise StageError(
            f"the Prefect server at {where} refused",
            measured=f"HTTP {status} {error.response.text[:200]}",
            remedy="Check PREFECT_API_URL and PREFECT_API_AUTH_STRING.",
        ) from error
