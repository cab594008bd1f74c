"""A divided step's parts at once on Dask workers: scattered, mapped, and left in the store for the step to gather.

Imported only where a run asks for it, since it loads Prefect and Dask.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from distributed import CancelledError, Client, KilledWorker, get_worker
from prefect import flow, tags, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner
from prefect_dask.task_runners import DaskTaskRunner, PrefectDaskFuture

from flows.prefect_api.flow_run_tag import OURS
from flows.running.child_process import Launcher
from flows.running.order import Order
from flows.settings import LOCAL_SHARDS, cores
from stages import stage
from stages.adapters.connect import connect
from stages.runtime.contract import Interrupted, Progress, Unavailable, Work
from stages.runtime.fingerprint import fingerprint
from stages.runtime.parts import gaps, standing
from stages.runtime.progress import Silent

PARTS_A_WORKER = 4
"""Several, so that at the end nobody waits long for the slowest worker."""
LEAST_UNITS, MOST_UNITS = 16, 512
"""A part loads the model once, which must be worth it; and a lost one must not be half of the work."""
WORKERS_WITHIN_S = 60


@dataclass(frozen=True)
class _Run:
    launcher: Launcher
    threads: int
    progress: Progress


_RUNS: dict[str, _Run] = {}
"""What goes on in this process, by a name that travels: a flow's parameters must be plain data."""


def scatter(order: Order, launcher: Launcher, where: str, progress: Progress) -> None:
    """Have what is missing of a divided step computed in parts, which its own run then gathers from the store.

    Args:
        order: the step.
        launcher: of the run; on this machine its store, logs and threads are the parts' too.
        where: `threads:N` for N parts at once on this machine, else the address of a Dask scheduler, whose workers
            need the step's image and reach the store by its URI and their own environment.
        progress: who listens.

    Raises:
        StageError: a part's own error.
        Unavailable: the cluster cannot be reached, has no worker, or lost a part too often.
        Interrupted: the run was stopped.
    """
    local = where.startswith(LOCAL_SHARDS)
    workers = int(where.removeprefix(LOCAL_SHARDS)) if local else _workers_at(where)
    runner = _threads(workers, launcher.store.scratch / "dask") if local else DaskTaskRunner(address=where)
    errand = order.as_json() | {"run": uuid.uuid4().hex, "store": launcher.store.uri}
    _RUNS[errand["run"]] = _Run(launcher, max(1, launcher.threads // workers), progress)
    named = _scatter.with_options(
        task_runner=cast("TaskRunner[PrefectFuture[Any]]", runner), flow_run_name=f"scatter {order.step}"
    )
    # Prefect sends the context of each task along: that of the step's own task holds open stores and locks.
    outside = cast("ContextVar[TaskRunContext | None]", TaskRunContext.__var__)
    token = outside.set(None)
    try:
        with tags(OURS):
            named(errand, workers)
    finally:
        outside.reset(token)
        del _RUNS[errand["run"]]


def _threads(count: int, folder: Path) -> DaskTaskRunner:
    kwargs = {"processes": False, "n_workers": 1, "threads_per_worker": count, "dashboard_address": "127.0.0.1:0"}
    return DaskTaskRunner(cluster_kwargs=kwargs | {"local_directory": str(folder)})


def _workers_at(address: str) -> int:
    """Parts that the cluster computes at once."""
    try:
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=WORKERS_WITHIN_S)
            return sum(client.nthreads().values())
    except OSError as error:  # a timeout is one
        raise Unavailable(
            f"the Dask cluster at {address} has no scheduler that answers, or no worker",
            measured=error,
            limit=f"one worker within {WORKERS_WITHIN_S} s",
            remedy="Start it, or leave $ENGINERY_SHARDS empty to score without it.",
        ) from error


@flow(name="scatter")
def _scatter(errand: dict[str, Any], workers: int) -> None:
    """The missing parts of a step, computed on Dask workers.

    Args:
        errand: the step's order, its store, and the run it belongs to.
        workers: parts that are computed at once.
    """
    # Flow and tasks travel to the workers by value, with the globals they name: so each names one function, no more.
    _scattered(errand, workers)


def _scattered(errand: dict[str, Any], workers: int) -> None:
    run = _RUNS[errand["run"]]
    count = _each([_units.submit(errand)], [range(1)], run, Silent())[0]
    present = standing(run.launcher.store.objects, fingerprint(Work.model_validate(errand["work"])))
    spans = divided(count, workers, present)
    if len(spans) < 2:
        return  # the step itself does it as fast
    run.progress.note(f"{len(spans)} parts of {sum(map(len, spans))} units on {workers} workers")
    futures = _part.map(unmapped(errand), [span.start for span in spans], [span.stop for span in spans])
    _each(futures, spans, run, run.progress)


def divided(count: int, workers: int, present: Iterable[range]) -> list[range]:
    """The parts to compute of `count` units, where those of `present` stand already."""
    size = math.ceil(count / (PARTS_A_WORKER * workers))
    return gaps(count, present, min(MOST_UNITS, max(LEAST_UNITS, size)))


def _each(futures: Iterable[PrefectFuture[Any]], spans: list[range], run: _Run, progress: Progress) -> list[Any]:
    """The results in the order in which they came; the first error ends all that has not begun."""
    pending = list(zip(cast("Iterable[PrefectDaskFuture[Any]]", futures), spans, strict=True))
    total, results = sum(map(len, spans)), []
    try:
        while pending:
            for future, span in [one for one in pending if one[0].wrapped_future.done()]:
                results.append(future.result())
                pending.remove((future, span))
                progress.advanced(total - sum(len(left) for _, left in pending), total)
            if run.launcher.stopped:
                raise Interrupted("the parts of a step were stopped")
            if pending:
                pending[0][0].wait(timeout=0.5)
    except (KilledWorker, CancelledError) as error:
        raise Unavailable(
            "the Dask cluster lost a part of a step, with the worker that computed it",
            measured=error,
            remedy="Look at the workers' logs and their memory limit. Parts that were done are kept.",
        ) from error
    finally:
        for future, _ in pending:
            future.wrapped_future.cancel()
    return results


def _infrastructure(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unavailable)


@task(name="units", cache_policy=NO_CACHE)
def _units(errand: dict[str, Any]) -> int:
    """How many units the step's work has."""
    return int(asked(errand, "units", "--units")["count"])


@task(
    name="part",
    task_run_name="part {start}-{stop}",
    retries=3,
    retry_delay_seconds=[2, 10, 30],
    retry_condition_fn=_infrastructure,
    cache_policy=NO_CACHE,
)
def _part(errand: dict[str, Any], start: int, stop: int) -> None:
    """The units from `start` up to `stop`, into the store."""
    asked(errand, f"{start}-{stop}", "--part", f"{start}:{stop}")


def asked(errand: dict[str, Any], name: str, *wanted: str) -> dict[str, Any]:
    """Start the step's child where this worker runs; returns its last event."""
    params = stage(errand["stage"]).params.model_validate(errand["params"])
    order = Order(
        step=f"{errand['step']}+{name}", stage=errand["stage"], params=params, work=Work.model_validate(errand["work"])
    )
    if here := _RUNS.get(errand["run"]):
        # The run's own child, that ends with it.
        return here.launcher.ask(order, Silent(), *wanted, threads=here.threads)
    store, threads = connect(errand["store"]), max(1, cores() // get_worker().state.nthreads)
    return Launcher(store, "process", threads, store.scratch / "shards").ask(order, Silent(), *wanted)
