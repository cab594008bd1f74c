"""One flow run of a work pool, followed to its end: its state from Prefect, its words and its pulse from the store.

Prefect's API may be away for minutes while the stage goes on: then the store alone tells that it lives, how far it is
and how it ended. Lost is only what the store, while it answered, heard nothing of.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx

from flows.prefect_api.retry import answered, patiently
from flows.running.attempts import not_deployed
from flows.running.placement import Pools
from flows.running.progress_relay import Receiver
from stages.runtime.contract import Interrupted, Progress, StageError
from stages.runtime.patience import Tolerance

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

POLL_S = 1.0
SILENT_S = 120.0
"""A container that the store heard nothing of for so long is lost: eight beats."""
END_S = 60.0
"""How long Prefect may take to end a flow run whose stage has said its error."""


@dataclass(frozen=True)
class Ended:
    """How a flow run ended.

    Attributes:
        last: how its stage said that it ended, empty where it did not.
        state: Prefect's, None where it is not known to be final.
        lost: how its container was lost, empty where Prefect or the stage says how it ended.
    """

    last: dict[str, Any]
    state: State[Any] | None = None
    lost: str = ""


@dataclass
class Follower:
    """Follows one flow run.

    Attributes:
        sealed: whether the step's artifact stands.
        stopped: ends the following.
    """

    client: SyncPrefectClient
    flow_run: FlowRun
    step: str
    pools: Pools
    heard: Receiver
    progress: Progress
    sealed: Callable[[], bool]
    stopped: threading.Event
    _api: Tolerance = field(default_factory=Tolerance)
    _store: Tolerance = field(default_factory=Tolerance)
    _no_worker_since: float | None = None
    _error_since: float | None = None

    def follow(self) -> Ended:
        """Wait for the end, telling what is heard.

        Raises:
            StageError: the pool has no live worker.
            Unavailable: Prefect's API or the store stayed away.
            Interrupted: the following was stopped.
        """
        submitted = time.monotonic()
        while not self.stopped.is_set():
            state = self._api.ask(self._state)
            self._store.ask(lambda: self.heard.hear(self.progress))
            if state is not None and state.is_final():
                # What it said between the last reading and its end; perhaps it was another start of the container.
                patiently(lambda: self.heard.hear(self.progress, anew=True), stopped=self.stopped)
                return Ended(self.heard.last, state)
            if self._said_its_end():
                return Ended(self.heard.last)
            if state is not None and state.is_scheduled():
                self._check_workers()
                submitted = time.monotonic()
            elif lost := self._lost(time.monotonic() - submitted):
                return Ended(self.heard.last, lost=lost)
            self.stopped.wait(POLL_S)
        raise Interrupted(f"step {self.step} was stopped")

    def _state(self) -> State[Any] | None:
        from prefect.exceptions import ObjectNotFound

        try:
            with answered():
                return self.client.read_flow_run(self.flow_run.id).state
        except ObjectNotFound as error:
            raise StageError(
                f"the flow run of step {self.step} was removed from Prefect while it went on",
                remedy="Run again: what is sealed stays.",
            ) from error

    def _said_its_end(self) -> bool:
        """Whether nothing is to be waited for: Prefect's word on it may come late, or never while its API is away."""
        event = self.heard.last.get("event")
        if event == "sealed":
            return bool(self._store.ask(self.sealed))
        if event != "error":
            self._error_since = None
            return False
        # The next attempt begins when this one has ended for Prefect, too.
        self._error_since = self._error_since or time.monotonic()
        return time.monotonic() - self._error_since > END_S

    def _lost(self, waited_s: float) -> str:
        silent_s = self.heard.silent_s
        if silent_s is None:
            late = waited_s > self.pools.start_seconds
            return f"step {self.step} did not start within {self.pools.start_seconds:g} s" if late else ""
        if silent_s <= SILENT_S or self.heard.last:
            return ""
        return f"the container of step {self.step} was lost (the store heard nothing of it for {silent_s:.0f} s)"

    def _check_workers(self) -> None:
        """Raise StageError once no worker of the pool has lived for the patience."""
        pool = self.flow_run.work_pool_name or ""
        ages = self._api.ask(lambda: _heartbeat_ages(self.client, pool))
        if ages is None or any(age < limit for age, limit in ages):
            self._no_worker_since = None
            return
        now, limit = time.monotonic(), self.pools.no_worker_seconds
        if self._no_worker_since is None:
            self._no_worker_since = now
            self.progress.note(f"pool {pool} has no live worker; waiting {limit:g} s for one")
        if now - self._no_worker_since >= limit:
            seen = f"the last was heard {min(age for age, _ in ages):.0f} s ago" if ages else "none was ever seen"
            raise StageError(
                f"work pool {pool} has no live worker",
                measured=seen,
                limit=f"{limit:g} s",
                remedy=f"Start one: prefect worker start --pool {pool}",
            )


def _heartbeat_ages(client: SyncPrefectClient, pool: str) -> list[tuple[float, float]]:
    """(seconds since the last heartbeat, seconds after which a worker counts as gone) of each worker."""
    try:
        with answered():
            # 3.8.8's server refuses the client's own defaults.
            workers = client.read_workers_for_work_pool(pool, offset=0, limit=200)
    except StageError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == 404:
            raise not_deployed(pool) from error
        raise
    now = datetime.now(UTC)
    return [
        ((now - one.last_heartbeat_time).total_seconds(), 1.5 * (one.heartbeat_interval_seconds or 30))
        for one in workers
        if one.last_heartbeat_time
    ]
