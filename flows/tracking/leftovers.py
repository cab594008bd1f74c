"""MLflow runs that nobody ended: their process was killed, or MLflow was away when it ended them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import psutil

from flows.tracking.batches import Buffer, send
from flows.tracking.connect import NOTE, Tracking
from flows.tracking.ends import End
from flows.tracking.errors import do_each

if TYPE_CHECKING:
    from mlflow.entities import Run

PARENT, RUN, PART, PROCESS, STARTED = (
    "mlflow.parentRunId",
    "enginery.run",
    "enginery.part_of",
    "enginery.process",
    "enginery.process_started",
)
"""Tags: MLflow's run that a step belongs to, the name of a recipe run and of that of a step, `host:pid` of the process,
when that began."""
_SLACK_S = 2.0
"""Clocks are set while processes run, and the kernel counts in ticks; a number is not given again so soon."""
_OPEN: set[str] = set()
"""The recipe runs that this process drives at this moment, by name."""
GONE = End(
    "KILLED",
    "**crashed**: its process ended without a word. The same command goes on from the last sealed step.",
)


@contextmanager
def held_open(run: str) -> Iterator[None]:
    """While it lasts, a recipe run of this process is no leftover."""
    _OPEN.add(run)
    try:
        yield
    finally:
        _OPEN.discard(run)


@cache
def process_tags(pid: int) -> Mapping[str, str]:
    """The tags that say which process a run is of. A process's number alone does not: it is given again."""
    return {PROCESS: f"{socket.gethostname()}:{pid}", STARTED: f"{psutil.Process(pid).create_time():.2f}"}


Known = Callable[[Tracking, str, str], End | None]
"""The end of a recipe run, from where it is recorded, its id there and its name; None where nobody knows."""


def end_leftovers(tracking: Tracking, known: Known) -> None:
    """End what this machine left running.

    Args:
        tracking: where.
        known: how a recipe run ended.

    Raises:
        Unavailable: MLflow does not answer.
        StageError: it refused to end one, which may be of another of its users; the others are ended.
    """
    running = list(_running(tracking))
    left = {run.info.run_id for run in running if _left(run.data.tags)}
    gone = [run for run in running if run.info.run_id in left or run.data.tags.get(PARENT) in left]
    do_each(partial(_end, tracking, run, known) for run in gone)


def _end(tracking: Tracking, run: Run, known: Known) -> None:
    tags, run_id = run.data.tags, run.info.run_id
    end = known(tracking, run_id, tags.get(RUN) or tags.get(PART, "")) or GONE
    if RUN not in tags:  # of a run that finished every step was sealed; of others nobody knows
        end = End("FINISHED", at_ms=end.at_ms) if end.status == "FINISHED" else replace(GONE, at_ms=end.at_ms)
    if end.description:
        send(tracking.client, run_id, Buffer(tags={NOTE: end.description}))
    tracking.client.set_terminated(run_id, end.status, end.at_ms)


def alive(pid: int, started: float | None) -> bool:
    """Whether a process runs that has this number and began at that time; what cannot be looked at does."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < _SLACK_S
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return _of_another(pid)


def _of_another(pid: int) -> bool:
    """Whether it is another user's, which some machines hide."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _left(tags: Mapping[str, str]) -> bool:
    host, _, pid = tags.get(PROCESS, "").rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    started = tags.get(STARTED)
    if process_tags(os.getpid()).items() <= tags.items():
        return (tags.get(RUN) or tags.get(PART)) not in _OPEN
    return not alive(int(pid), float(started) if started else None)


def _running(tracking: Tracking) -> Iterator[Run]:
    token = None
    while True:
        page = tracking.client.search_runs(
            [tracking.experiment_id], "attributes.status = 'RUNNING'", max_results=1000, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return
