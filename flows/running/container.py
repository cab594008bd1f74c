"""The Prefect flow in a stage's container: `run_stage` starts the stage as a child and passes on what it says.

The child gets the store and nothing else: no credential of Prefect or MLflow. It and this flow are all that a stage's
image needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from prefect.states import Failed

from flows.prefect_api.progress import Bar, RunLog
from flows.prefect_api.retry import api, await_api, patiently
from flows.running.child_process import Launcher
from flows.running.order import Order
from flows.running.progress_relay import Sender
from stages import stage
from stages.__main__ import described
from stages.adapters.connect import connect
from stages.runtime.contract import StageError, Work
from stages.runtime.patience import be_patient
from stages.runtime.progress import Listeners


@flow(name="run-stage", validate_parameters=False)
def run_stage(
    order: dict[str, Any], store: str, threads: int = 1, minutes: float | None = None, one_at_a_time: str = ""
) -> dict[str, Any] | State[Any]:
    """Bring one step to its sealed artifact.

    Args:
        order: the step, as `Order.as_json` writes it.
        store: URI of the store.
        threads: threads of computation it may use.
        minutes: its time limit.
        one_at_a_time: a global concurrency limit of which it takes one slot while it computes.

    Returns:
        identity, cached and changed of the artifact. A stage's error is a failed state that bears its name and text.
    """
    be_patient()
    opened = patiently(lambda: connect(store))
    launcher = Launcher(opened, "process", threads, opened.scratch / "logs" / str(flow_run.id), minutes)
    sender = Sender(opened.objects, str(flow_run.id))
    log = RunLog(get_run_logger())
    try:
        with _turn(one_at_a_time, log):
            outcome = launcher.run(_read(order), Listeners((log, Bar(order["step"]), sender)))
    except StageError as error:
        sender.end({"event": "error", **described(error)})
        await_api(str(flow_run.id))
        return Failed(name=type(error).__name__, message=str(error))
    except BaseException:
        launcher.stop()
        raise
    said = {"identity": outcome.identity, "cached": outcome.cached, "changed": outcome.changed}
    sender.end({"event": "sealed", **said})
    await_api(str(flow_run.id))
    return said


def _read(order: dict[str, Any]) -> Order:
    return Order(
        step=order["step"],
        stage=order["stage"],
        params=stage(order["stage"]).params.model_validate(order["params"]),
        work=Work.model_validate(order["work"]),
        force=order["force"],
    )


@contextmanager
def _turn(limit: str, log: RunLog) -> Iterator[None]:
    """Hold a slot of a global concurrency limit: one build a GPU, whatever the pools allow."""
    if not limit:
        yield
        return
    log.note(f"waits for a slot of {limit!r}")
    with ExitStack() as slot:
        patiently(lambda: _taken(slot, limit))
        log.note(f"has a slot of {limit!r}")
        try:
            yield
        finally:
            # A server that is away takes a slot back by itself, when its lease is not renewed.
            with suppress(httpx.HTTPError), api():
                slot.close()


def _taken(slot: ExitStack, limit: str) -> None:
    """Wait for a slot, which `slot` gives back."""
    try:
        # A server that is away for a moment must not end a build that goes well.
        slot.enter_context(concurrency(limit, occupy=1, strict=True, raise_on_lease_renewal_failure=False))
    except ConcurrencySlotAcquisitionError as error:
        # Prefect's text has everything but whether another try may help, which its cause tells.
        raise (error.__cause__ or error) from error
