"""One run of a recipe, whoever drives it: its steps, its verdict, its report, its registered version."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from flows.prefect_api.retry import AWAY_S, patiently
from flows.recipe.expand import Expanded, PlannedStep
from flows.recipe.model import Recipe
from flows.results import RunResult, StepResult
from flows.running.admission import refuse_inadmissible
from flows.running.child_process import Launcher
from flows.running.interruption import ended_by, unwinding
from flows.running.loose_ends import LooseEnds
from flows.running.order import Order
from flows.running.placement import devices, load_pools
from flows.running.plan import Planned, check_start, resolve
from flows.running.run_records import Record, Recorder, open_run
from flows.running.step_queue import Slots
from flows.running.tracked_run import tracked_run
from flows.running.work_pool import Dispatcher
from flows.settings import Settings, enter
from flows.tracking.connect import open_tracking
from flows.tracking.runs import RecipeRun
from flows.tracking.steps import StepRun
from stages import stage
from stages.measures.size import size_bytes
from stages.measures.table import BENCH
from stages.runtime.artifacts import Store
from stages.runtime.contract import Image, Interrupted, Kind, Manifest, Progress, StageError
from stages.runtime.execute import Outcome
from stages.runtime.fingerprint import fingerprint
from stages.runtime.parts import drop
from stages.runtime.patience import BRIEFLY_S
from stages.runtime.progress import Listeners


class Terminal(Protocol):
    """Who shows a run to a person."""

    def for_step(self, name: str) -> Progress:
        """The listener of one step."""

    def started(self, step: str) -> None:
        """A step begins to run."""

    def finished(self, step: str, seconds: float, cached: bool, why: str) -> None:
        """A step's artifact is sealed."""

    def failed(self, step: str, text: str) -> None:
        """A step broke."""

    def line(self, text: str) -> None:
        """A sentence about the whole run."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that the steps of one run share. `done` and `remade` fill up while it runs.

    Attributes:
        ended: the result once nothing undoes it, empty before: what breaks from then on makes no failure of the run.
    """

    asked: Expanded
    steps: Sequence[PlannedStep]
    settings: Settings
    store: Store
    terminal: Terminal
    record: Record
    planned: Mapping[str, Planned]
    launcher: Launcher
    slots: Slots
    mlflow: RecipeRun
    started: float
    done: dict[str, StepResult] = field(default_factory=dict)
    remade: set[str] = field(default_factory=set)
    errors: dict[str, BaseException] = field(default_factory=dict)
    ended: list[RunResult] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """What is run."""
        return self.asked.recipe

    @property
    def loose(self) -> LooseEnds:
        """Who is told of what breaks after the run has ended."""
        return LooseEnds(self.record, self.terminal.line)


Facing = Callable[[Expanded, Store], Sequence[PlannedStep]]
"""A recipe's steps, and what only the store can tell: the measurements of the champion."""


@contextmanager
def opened(asked: Expanded, settings: Settings, terminal: Terminal, facing: Facing) -> Iterator[Session]:
    """A session with the embedded lock held, the record and the MLflow run open; closed by how the block ends."""
    recipe, pooled = asked.recipe, settings.launcher == "pool"
    away_s = AWAY_S if pooled else BRIEFLY_S
    scratch = patiently(lambda: enter(settings), away_s=away_s)
    with nullcontext() if pooled else _alone(scratch, terminal) as holder:
        record = open_run(scratch, recipe, sys.argv)
        if holder:
            holder.write_text(f"run {record.name} of {recipe.name}, process {os.getpid()},", encoding="utf-8")
        ended: list[RunResult] = []
        try:
            with ended_by(last=lambda: None if ended else record.failed(KeyboardInterrupt())):
                store = patiently(settings.connect, away_s=away_s)
                steps = patiently(lambda: facing(asked, store), away_s=away_s)
                yield from _followed(asked, steps, settings, terminal, store, record, ended)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                unwinding()
            if not ended:
                record.failed(error)
            raise


def _followed(
    asked: Expanded,
    steps: Sequence[PlannedStep],
    settings: Settings,
    terminal: Terminal,
    store: Store,
    record: Record,
    ended: list[RunResult],
) -> Iterator[Session]:
    """Plan the run, follow it in MLflow, and hold the session while it lasts."""
    scratch, away_s = settings.scratch, AWAY_S if settings.launcher == "pool" else BRIEFLY_S
    planned = patiently(lambda: planned_steps(steps, settings, store, terminal.for_step), away_s=away_s)
    refuse_inadmissible(planned, asked.recipe, store, terminal.line)
    launcher = _launcher(store, settings, record)
    loose, opening = LooseEnds(record, terminal.line), lambda: patiently(lambda: open_tracking(scratch), away_s=away_s)
    with (
        tracked_run(opening, asked, planned, store.uri, loose, ended, unopened=launcher.stop) as mlflow,
        ended_by(hurry=lambda: launcher.stop(now=True)),
    ):
        yield Session(
            asked=asked,
            steps=steps,
            settings=settings,
            store=store,
            terminal=terminal,
            record=record,
            planned=planned,
            launcher=launcher,
            slots=Slots(settings.jobs),
            mlflow=mlflow,
            started=time.monotonic(),
            ended=ended,
        )


def run_step(session: Session, name: str, *listeners: Progress) -> StepResult:
    """Bring one step to its sealed artifact; the steps it reads must be done.

    Raises:
        StageError: the stage's own; the step's MLflow run says so too.
    """
    planned = session.planned[name]
    tracked = session.mlflow.child(name, planned.order.work.params)
    forced = planned.order.force or bool(session.remade & set(planned.after))
    if planned.manifest and not forced:
        outcome = Outcome(planned.identity, planned.manifest, cached=True, changed=False)
        return _done(session, planned, outcome, 0.0, tracked)
    progress = Listeners(
        (session.terminal.for_step(name), Recorder(session.record, name), tracked.progress, *listeners)
    )
    try:
        with _slot(session, name):
            session.launcher.check_open(name)
            session.terminal.started(name)
            session.record.log({"event": "started", "step": name, "why": planned.why})
            began = time.monotonic()
            order = replace(planned.order, force=forced)
            _scatter(session, order, progress)
            outcome = session.launcher.run(order, progress)
    except Interrupted:
        tracked.interrupted()
        session.record.log({"event": "interrupted", "step": name})
        raise
    except BaseException as error:
        tracked.failed(error)
        session.record.log({"event": "failed", "step": name, "what": str(error) or type(error).__name__})
        session.terminal.failed(name, str(error))
        raise
    if forced and outcome.changed:
        session.remade.add(name)
    return _done(session, planned, outcome, time.monotonic() - began, tracked)


def _scatter(session: Session, order: Order, progress: Progress) -> None:
    """Have the parts of a step computed at once, where its work is divided and the settings say where."""
    if stage(order.stage).divided is None:
        return
    if order.force:
        drop(session.store.objects, fingerprint(order.work))
    if session.settings.shards:
        from flows.running.dask_parts import scatter

        scatter(order, session.launcher, session.settings.shards, progress)


def _launcher(store: Store, settings: Settings, record: Record) -> Launcher:
    launcher = Launcher(store, settings.launcher, settings.threads, record.folder / "steps")
    if settings.launcher == "pool":
        launcher.dispatcher = Dispatcher(store, load_pools(), settings.threads, record.name)
    return launcher


def planned_steps(
    steps: Sequence[PlannedStep], settings: Settings, store: Store, listener: Callable[[str], Progress]
) -> dict[str, Planned]:
    """The steps with their identities, as --force and --from have them; each of the two must name a step."""
    names = [step.name for step in steps]
    for name in sorted(settings.force - set(names)):
        raise StageError(f"--force names no step: {name!r}", limit=", ".join(names))
    there = devices(settings)
    planned = resolve(steps, store, listener, settings.force, there)
    if settings.from_step is not None:
        again = check_start(planned, settings.from_step)
        planned = resolve(steps, store, listener, settings.force | again, there)
    return planned


@contextmanager
def _alone(scratch: Path, terminal: Terminal) -> Iterator[Path]:
    """One embedded run at a time beside a store: SQLite and two cores serve one well. Yields where the holder signs."""
    holder = scratch / "run.lock"
    with holder.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = holder.read_text(encoding="utf-8") or "another run"
            terminal.line(f"{other} is going on beside this store; this one waits for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield holder


@contextmanager
def _slot(session: Session, name: str) -> Iterator[None]:
    """Steps that compute share the slots, those that are timed have all; those that only move bytes run beside."""
    if stage((order := session.planned[name].order).stage).image_of(order.params) is Image.BASE:
        yield
        return
    # What is timed would be slower beside another step than it is.
    with session.slots.take(list(session.planned).index(name), alone=order.stage == BENCH):
        yield


def _done(session: Session, planned: Planned, outcome: Outcome, seconds: float, tracked: StepRun) -> StepResult:
    manifest = outcome.manifest
    result = StepResult(
        name=planned.name,
        stage=planned.order.stage,
        kind=manifest.kind,
        fingerprint=outcome.identity,
        uri=f"{session.store.uri}#{outcome.identity}",
        cached=outcome.cached,
        seconds=round(seconds, 2),
        peak_rss_bytes=manifest.provenance.peak_rss_bytes,
        metrics={"size_bytes": float(model_size(manifest)), **manifest.metrics},
        why="" if outcome.cached else planned.why,
        measures=planned.measures,
        corpus=planned.corpus,
        device=manifest.work.executor["device"] if planned.order.stage == BENCH else "",
    )
    tracked.finished(manifest, outcome.identity, session.store.uri, outcome.cached, session.store)
    session.record.log(
        {"event": "sealed", "step": planned.name, "fingerprint": outcome.identity, "cached": outcome.cached}
    )
    session.done[planned.name] = result
    session.terminal.finished(planned.name, seconds, outcome.cached, result.why)
    return result


def manifest_of(session: Session, name: str) -> Manifest:
    """The manifest of a step that is done."""
    if found := session.store.manifest(session.done[name].fingerprint):
        return found
    raise StageError(f"the artifact of {name} was removed while the run went on", remedy="Run again.")


MODELS = (Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE)


def model_size(manifest: Manifest) -> int:
    """Bytes of a model's own files; of all files where the artifact is no model."""
    if manifest.kind not in MODELS:
        return manifest.size_bytes
    return size_bytes({name: entry.size for name, entry in manifest.files.items()})
