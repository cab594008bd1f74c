"""Run one step in a work pool: a flow run of `run-stage/<pool>`, followed to its end.

Two runs that need the same artifact follow the same container, and a new attempt begins only when the last one has
ended without sealing it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from flows.prefect_api.retry import api, patiently
from flows.running.attempts import attempts, begin, cancel, give_up, is_final
from flows.running.following import Ended, Follower
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

_STOP_S = 2.0
"""How long the end of a run waits for a server to take a cancellation."""


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
    _stopped: threading.Event = field(default_factory=threading.Event)

    def launch(self, order: Order, progress: Progress) -> Outcome:
        """Bring one step to its sealed artifact.

        Raises:
            StageError: the stage's own error; no live worker; a container that was lost on every attempt.
            Unavailable: Prefect or the store stayed away.
            Interrupted: the run was stopped.
        """
        place, lost = self.pools.place(order.stage), ""
        with api() as client:
            for _ in range(self.pools.attempts):
                begun = patiently(
                    lambda: self._begin(client, order, place, progress), say=progress.note, stopped=self._stopped
                )
                if isinstance(begun, Outcome):
                    return begun
                flow_run, ours = begun
                outcome, lost = self._followed(client, flow_run, order, progress, ours=ours)
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
        from prefect.exceptions import ObjectNotFound
        from prefect.states import Cancelling

        with self._guard:
            self._stopped.set()
            running = list(self._following.values())
        if not running:
            return
        with api(_STOP_S) as client:
            for one in running:
                try:
                    client.set_flow_run_state(one, Cancelling(message="the run that needs it was stopped"))
                except (httpx.HTTPStatusError, ObjectNotFound):
                    continue
                except httpx.HTTPError:
                    return  # whatever stopped the run is what is told; a server that is away cannot cancel anything

    @property
    def _tag(self) -> str:
        return f"run:{self.run}"

    def key(self, order: Order) -> str:
        """What names this work among the server's flow runs: the same work, in the same store, is done once."""
        key = f"{fingerprint(order.work)}:{digest_bytes(self.store.uri.encode())[:8]}"
        return f"{key}:{self.run}" if order.force else key

    def _begin(
        self, client: SyncPrefectClient, order: Order, place: Place, progress: Progress
    ) -> tuple[FlowRun, bool] | Outcome:
        """The flow run that makes this artifact, and whether it is ours; or what another run's has just made."""
        work = self.key(order)
        known = attempts(client, work)
        if known and not is_final(known[-1]):
            progress.note(f"follows {known[-1].name} of pool {place.pool}, which makes the same artifact")
            return known[-1], self._tag in known[-1].tags
        # Another run's attempt may have sealed it after this run looked and before it asked for attempts.
        if known and not order.force and (made := self._sealed(order, {"cached": True})):
            return made
        flow_run = begin(
            known,
            work,
            pool=place.pool,
            name=order.step,
            tags=[order.stage, self._tag],
            parameters={
                "order": order.as_json(),
                "store": self.store.uri,
                "threads": self.threads,
                "minutes": place.minutes,
                "one_at_a_time": place.one_at_a_time,
            },
            job_variables=self.pools.job_variables(order.stage, order.params),
        )
        # The server gives back another run's where two begin at once.
        return flow_run, self._tag in flow_run.tags

    def _followed(
        self, client: SyncPrefectClient, flow_run: FlowRun, order: Order, progress: Progress, *, ours: bool
    ) -> tuple[Outcome | None, str]:
        """The outcome, or None and how the container was lost."""
        key = str(flow_run.id)
        if ours:  # what another run started is not this run's to cancel
            with self._guard:
                self._following[key] = flow_run.id
            if self._stopped.is_set():
                self.stop()
        heard = Receiver(self.store.objects, key)
        try:
            ended = Follower(
                client=client,
                flow_run=flow_run,
                step=order.step,
                pools=self.pools,
                heard=heard,
                progress=progress,
                sealed=lambda: self._sealed(order, {}) is not None,
                stopped=self._stopped,
            ).follow()
        except StageError:
            if ours and not self._stopped.is_set():
                cancel(client, flow_run, "the run that needs it gave up")
            raise
        finally:
            with self._guard:
                self._following.pop(key, None)
        if ended.last.get("event") == "error":
            raise rebuilt(ended.last)
        if outcome := self._made(order, ended):
            patiently(heard.forget, stopped=self._stopped)  # an error stays for all who follow it; `sweep` takes it
            return outcome, ""
        return None, self._why_lost(client, flow_run, order, ended, ours=ours)

    def _made(self, order: Order, ended: Ended) -> Outcome | None:
        """The artifact, whoever sealed it; what was forced stood before, and only a word says that it is new."""
        done = ended.last.get("event") == "sealed" or (ended.state is not None and ended.state.is_completed())
        if not done and order.force:
            return None
        return patiently(lambda: self._sealed(order, ended.last), stopped=self._stopped)

    def _why_lost(self, client: SyncPrefectClient, flow_run: FlowRun, order: Order, ended: Ended, *, ours: bool) -> str:
        """How a container was lost; raises what is no loss."""
        state = ended.state
        if state is None:
            why = ended.lost or "its artifact was removed"
            give_up(client, flow_run, why)
            return why
        if state.is_completed():
            return "its artifact was removed"
        if state.is_cancelled() and (ours or self._stopped.is_set()):
            raise Interrupted(f"step {order.step} was cancelled")
        if state.is_crashed() or state.is_cancelled():
            return f"the container of step {order.step} was lost ({state.name}: {state.message or 'no message'})"
        pool = self.pools.place(order.stage).pool
        raise StageError(f"step {order.step} ended as {state.name} in pool {pool}: {state.message}")

    def _sealed(self, order: Order, last: dict[str, Any]) -> Outcome | None:
        identity = fingerprint(order.work)
        manifest = self.store.manifest(identity)
        if manifest is None:
            return None
        return Outcome(identity, manifest, cached=last.get("cached", False), changed=last.get("changed", True))
