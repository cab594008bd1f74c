"""Run one step in a work pool: a flow run of `run-stage/<pool>`, followed to its end.

Prefect's `run_deployment` never raises when the child failed and gives back an old run for a key it knows, even a
failed one. So the key is the work's fingerprint and an attempt: two runs that need the same artifact follow the same
container, and a new attempt begins only when the last one has ended without sealing it.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx

from flows.prefect_api.retry import patiently
from flows.running.placement import Place, Pools
from flows.running.progress_relay import Receiver
from stages.__main__ import rebuilt
from stages.runtime.artifacts import Store
from stages.runtime.contract import Interrupted, Progress, StageError
from stages.runtime.execute import Outcome
from stages.runtime.fingerprint import digest_bytes, fingerprint

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.running.order import Order

RUNNER = "run-stage"
POLL_S = 1.0
_KEYS = 200


@dataclass
class Dispatcher:
    """Starts steps in work pools and can cancel those it started.

    Attributes:
        store: where artifacts are sealed; the containers must reach it by the same URI.
        pools: where each stage runs.
        threads: threads of computation a step may use.
        run: name of the recipe run, for steps that are forced.
    """

    store: Store
    pools: Pools
    threads: int
    run: str
    _following: dict[str, Any] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def launch(self, order: Order, progress: Progress) -> Outcome:
        """Bring one step to its sealed artifact.

        Raises:
            StageError: the stage's own error; no live worker; a container that was lost on every attempt.
            Unavailable: Prefect or the store stayed away.
            Interrupted: the run was stopped.
        """
        from prefect.client.orchestration import get_client

        place, lost = self.pools.place(order.stage), ""
        with get_client(sync_client=True) as client:
            for _ in range(self.pools.attempts):
                flow_run, ours = patiently(lambda: self._begin(client, order, place, progress))
                outcome, lost = self._followed(client, flow_run, order, place, progress, ours=ours)
                if outcome is not None:
                    return outcome
                progress.note(f"{lost}; it is started again")
        raise StageError(
            f"step {order.step} was lost in pool {place.pool} {self.pools.attempts} times",
            measured=lost,
            remedy="Look at the worker's log and at the memory of its machine.",
        )

    def stop(self) -> None:
        """Cancel what runs; sealed artifacts and partial state stay."""
        from prefect.client.orchestration import get_client
        from prefect.states import Cancelling

        with self._guard:
            self._stopped = True
            running = list(self._following.values())
        if not running:
            return
        with get_client(sync_client=True) as client:
            for one in running:
                # Whatever stopped the run is what is told; a server that is away cannot cancel anything.
                with suppress(httpx.HTTPError):
                    client.set_flow_run_state(one, Cancelling(message="the run that needs it was stopped"))

    @property
    def _tag(self) -> str:
        return f"run:{self.run}"

    def key(self, order: Order) -> str:
        """What names this work among the server's flow runs: the same work, in the same store, is done once."""
        key = f"{fingerprint(order.work)}:{digest_bytes(self.store.uri.encode())[:8]}"
        return f"{key}:{self.run}" if order.force else key

    def _begin(self, client: SyncPrefectClient, order: Order, place: Place, progress: Progress) -> tuple[FlowRun, bool]:
        """The flow run that makes this artifact, and whether it is a new attempt or one that goes on already."""
        from prefect.deployments import run_deployment
        from prefect.exceptions import ObjectNotFound

        prefix = self.key(order)
        known = _attempts(client, prefix)
        if known and not _final(known[-1]):
            progress.note(f"follows {known[-1].name} of pool {place.pool}, which makes the same artifact")
            return known[-1], self._tag in known[-1].tags
        variables = {
            "image": self.pools.image(order.stage),
            "network": self.pools.networks[place.network],
            "memory_bytes": place.memory_bytes,
            "seconds": int(place.minutes * 60) + 120,
        }
        try:
            flow_run = run_deployment(
                f"{RUNNER}/{place.pool}",
                parameters={
                    "order": order.as_json(),
                    "store": self.store.uri,
                    "threads": self.threads,
                    "minutes": place.minutes,
                    "one_at_a_time": place.one_at_a_time,
                },
                flow_run_name=order.step,
                tags=[order.stage, self._tag],
                timeout=0,
                idempotency_key=f"{prefix}:{len(known) + 1}",
                job_variables=variables,
            )
        except ObjectNotFound as error:
            raise _not_deployed(place.pool) from error
        # The server gives back another run's where two begin at once.
        return flow_run, self._tag in flow_run.tags  # type: ignore[return-value,union-attr]

    def _followed(
        self,
        client: SyncPrefectClient,
        flow_run: FlowRun,
        order: Order,
        place: Place,
        progress: Progress,
        *,
        ours: bool,
    ) -> tuple[Outcome | None, str]:
        """The outcome, or None and how the container was lost."""
        from prefect.states import Cancelled

        key = str(flow_run.id)
        if ours:  # what another run started is not this run's to cancel
            with self._guard:
                self._following[key] = flow_run.id
            if self._stopped:
                self.stop()
        try:
            heard = Receiver(self.store.objects, key)
            state = self._final_state(client, flow_run, order, place, progress, heard)
        except StageError:
            if ours and not self._stopped:  # nobody waits for it any more
                with suppress(httpx.HTTPError):
                    client.set_flow_run_state(flow_run.id, Cancelled(message="the run that needs it gave up"))
            raise
        finally:
            with self._guard:
                self._following.pop(key, None)
        if state is None:
            return None, f"step {order.step} did not start within {self.pools.start_seconds:g} s"
        last = heard.last
        if last.get("event") == "error":
            raise rebuilt(last)
        if state.is_completed():
            return self._sealed(order, last), "its artifact was removed"
        if state.is_cancelled() and (ours or self._stopped):
            raise Interrupted(f"step {order.step} was cancelled")
        if state.is_crashed() or state.is_cancelled():
            return None, f"the container of step {order.step} was lost ({state.name}: {state.message or 'no message'})"
        raise StageError(f"step {order.step} ended as {state.name} in pool {place.pool}: {state.message}")

    def _sealed(self, order: Order, last: dict[str, Any]) -> Outcome | None:
        identity = fingerprint(order.work)
        manifest = patiently(lambda: self.store.manifest(identity))
        if manifest is None:
            return None
        return Outcome(identity, manifest, cached=last.get("cached", False), changed=last.get("changed", True))

    def _final_state(
        self,
        client: SyncPrefectClient,
        flow_run: FlowRun,
        order: Order,
        place: Place,
        progress: Progress,
        heard: Receiver,
    ) -> Any:
        """Follow a run, telling what it says; None when it never started."""
        submitted = time.monotonic()
        watch = _Workers(client, flow_run.work_pool_name or place.pool, self.pools.no_worker_seconds, progress)
        while True:
            if self._stopped:
                raise Interrupted(f"step {order.step} was stopped")
            state = patiently(lambda: client.read_flow_run(flow_run.id).state)
            patiently(lambda: heard.hear(progress))
            if state is not None and state.is_final():
                patiently(lambda: heard.hear(progress))  # what it said between the last reading and its end
                if state.is_completed():  # an error stays for all who follow it; `sweep` takes it
                    patiently(heard.forget)
                return state
            if state is None or state.is_scheduled():
                watch.check()
                submitted = time.monotonic()
            elif state.is_pending() and time.monotonic() - submitted > self.pools.start_seconds:
                _give_up(client, flow_run)
                return None
            time.sleep(POLL_S)


@dataclass
class _Workers:
    """Whether a pool has a worker that lives, asked while a step waits for one. What waited in vain is cancelled."""

    client: SyncPrefectClient
    pool: str
    patience_s: float
    progress: Progress
    _since: float | None = None

    def check(self) -> None:
        """Raise StageError once no worker has lived for the patience."""
        ages = patiently(lambda: _heartbeat_ages(self.client, self.pool))
        if any(age < limit for age, limit in ages):
            self._since = None
            return
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self.progress.note(f"pool {self.pool} has no live worker; waiting {self.patience_s:g} s for one")
        if now - self._since >= self.patience_s:
            seen = f"the last was heard {min(age for age, _ in ages):.0f} s ago" if ages else "none was ever seen"
            raise StageError(
                f"work pool {self.pool} has no live worker",
                measured=seen,
                limit=f"{self.patience_s:g} s",
                remedy=f"Start one: prefect worker start --pool {self.pool}",
            )


def _heartbeat_ages(client: SyncPrefectClient, pool: str) -> list[tuple[float, float]]:
    """(seconds since the last heartbeat, seconds after which a worker counts as gone) of each worker."""
    try:
        # 3.8.8's server refuses the client's own defaults.
        workers = client.read_workers_for_work_pool(pool, offset=0, limit=200)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 404:
            raise
        raise _not_deployed(pool) from error
    now = datetime.now(UTC)
    return [
        ((now - one.last_heartbeat_time).total_seconds(), 1.5 * (one.heartbeat_interval_seconds or 30))
        for one in workers
        if one.last_heartbeat_time
    ]


def _not_deployed(pool: str) -> StageError:
    return StageError(
        f"there is no work pool {pool} with a deployment {RUNNER}/{pool}",
        remedy="`enginery deploy` makes both; see infra/.",
    )


def _attempts(client: SyncPrefectClient, prefix: str) -> list[FlowRun]:
    """Flow runs of one work, first attempt first."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
    from prefect.client.schemas.sorting import FlowRunSort

    keys = [f"{prefix}:{number}" for number in range(1, _KEYS + 1)]
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys)),
        sort=FlowRunSort.START_TIME_ASC,
        limit=_KEYS,
    )
    return sorted(found, key=lambda one: keys.index(one.idempotency_key or keys[0]))


def _final(flow_run: FlowRun) -> bool:
    return flow_run.state is not None and flow_run.state.is_final()


def _give_up(client: SyncPrefectClient, flow_run: FlowRun) -> None:
    from prefect.states import Crashed

    client.set_flow_run_state(flow_run.id, Crashed(message="submitted, but its container never started"), force=True)
