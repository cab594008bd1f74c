"""Runs, curves and small files in MLflow: one parent run a recipe run, one child run a step.

Steps run in threads at once, so every call names its run: the fluent interface keeps the active run in global state.
A thread opens MLflow, which takes two seconds to load, and then sends what the steps say: no step waits for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flows.tracking.batches import Buffer, flattened, now, send
from flows.tracking.connect import NOTE, Tracking
from flows.tracking.datasets import Dataset, inputs
from flows.tracking.ends import End
from flows.tracking.errors import Refused, do_each
from flows.tracking.leftovers import PART, RUN, Known, end_leftovers, held_open, process_tags
from flows.tracking.steps import Opening, StepRun, Told
from stages.runtime.contract import Interrupted, Unavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_S = 2.0
HURRY_S = 3.0
"""How long a person who interrupts a run waits for MLflow."""
_LAST_TRY_S = 30.0
"""How long a run that a service made fail waits for MLflow: it has waited for that service already."""

T = TypeVar("T")


class Again(Protocol):
    """Who asks until there is an answer, while MLflow is away."""

    def __call__(self, ask: Callable[[], T], /, stopped: threading.Event | None = None) -> T:
        """The answer; no longer asked for once `stopped` is set."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A recipe run at its beginning.

    Attributes:
        recipe: its name.
        run: the run's name in `enginery runs`.
        tags: more of the run's.
        text: the recipe as it runs.
        params: of the whole recipe, nested or flat.
        read: step -> what it reads from outside; under the empty name what the whole run does.
    """

    recipe: str
    run: str
    tags: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, tuple[Dataset, ...]] = field(default_factory=dict)


def plain_end(_tracking: Tracking, _run_id: str, error: BaseException | None) -> End:
    """The end of a run of which nothing is known but the error that ended it."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return End("KILLED", "**interrupted**")
    return End("FINISHED") if error is None else End("FAILED", "**failed**")


def _once(ask: Callable[[], T], /, stopped: threading.Event | None = None) -> T:
    return ask()


@dataclass(frozen=True, kw_only=True)
class Close:
    """How a recipe run is closed.

    Attributes:
        end: its end, from where it is recorded, its id there and the error that ended it, None for none.
        known: the end of an earlier run, from where it is recorded, its id there and its name; None where nobody knows.
        told: hears what did not come about in MLflow. None of it is an error of the run.
        again: asks again while MLflow is away.
        unopened: ends what the run does, as MLflow could not be opened: nothing of it could be followed.
    """

    end: Callable[[Tracking, str, BaseException | None], End] = plain_end
    known: Known = lambda _tracking, _id, _run: None
    told: Told = lambda _what, _error: None
    again: Again = _once
    unopened: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class RecipeRun:
    """The parent run."""

    start: Start
    told: Told
    began_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    opened: Future[tuple[Tracking, str]] = field(default_factory=Future)
    closed: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    steps: list[StepRun] = field(default_factory=list)

    @property
    def tracking(self) -> Tracking:
        """Where it is recorded, waited for.

        Raises:
            Unavailable: MLflow does not answer.
            StageError: it refuses the run.
        """
        return self.opened.result()[0]

    @property
    def id(self) -> str:
        """MLflow's own name of the run; see `tracking`."""
        return self.opened.result()[1]

    def child(self, step_name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> StepRun:
        """Begin a step's run."""
        ours = {PART: self.start.run, "enginery.step": step_name}
        opening = Opening(
            name=step_name,
            tags={**_source(), **process_tags(os.getpid()), **ours, **(tags or {})},
            params=flattened(params),
            read=self.start.read.get(step_name, ()),
        )
        step = StepRun(self, opening, self.told)
        self.steps.append(step)
        return step

    def summary(self, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Figures and tags of the whole run: the verdict, the version, what was executed."""
        send(self.tracking.client, self.id, Buffer(points=now(metrics or {}), tags=dict(tags or {})))

    def artifact(self, path: Path) -> None:
        """Log a file of the whole run, such as the report."""
        self.tracking.client.log_artifact(self.id, str(path))

    def open_and_follow(self, opening: Callable[[], Tracking], close: Close) -> None:
        """Open MLflow and begin the run there, then send what the steps say, every few seconds."""
        try:
            self.opened.set_result(self._open(opening, close))
        except BaseException as error:  # noqa: BLE001 - raised where the run is waited for
            self.opened.set_exception(error)
            close.unopened()
            return
        while not self.closed.wait(FLUSH_S):
            for step in list(self.steps):
                step.flush()

    def _open(self, opening: Callable[[], Tracking], close: Close) -> tuple[Tracking, str]:
        def patiently(ask: Callable[[], T]) -> T:
            return close.again(ask, stopped=self.given_up)

        tracking = patiently(opening)
        try:
            patiently(lambda: end_leftovers(tracking, close.known))
        except Refused as refused:
            close.told("the end of an earlier run in MLflow", refused)
        tries = count()
        identity = patiently(lambda: _created(tracking, self, again=next(tries) > 0))
        patiently(lambda: self._begin(tracking.client, identity))
        return tracking, identity

    def _begin(self, client: MlflowClient, identity: str) -> None:
        """Say what is known before anything runs. To do it again does no harm."""
        send(client, identity, Buffer(params=flattened(self.start.params) if self.start.params else {}))
        if read := self.start.read.get(""):
            client.log_inputs(identity, inputs(read))
        if self.start.text:
            client.log_text(identity, self.start.text, "recipe.yaml")

    def settle(self, end: End, ended_ms: int) -> None:
        """End the run, then its steps: one that neither finished nor failed was cut off. Again does no harm.

        Raises:
            Unavailable: MLflow does not answer.
            StageError: it refused to end a run; the others are ended.
        """
        client = self.tracking.client
        send(client, self.id, Buffer(tags={NOTE: end.description} if end.description else {}))
        client.set_terminated(self.id, end.status, ended_ms)
        for step in self.steps:
            step.interrupted()
        do_each(step.settle for step in self.steps)


@contextmanager
def recipe_run(opening: Callable[[], Tracking], start: Start, close: Close | None = None) -> Iterator[RecipeRun]:
    """One recipe run as a parent run, ended by how the block ends.

    The block begins while MLflow is opened; where that fails the block's own error is but an echo, and MLflow's is
    raised. What MLflow fails in after the beginning is told and breaks nothing, and runs that stay open for it are
    ended by the next recipe run of this machine.

    Args:
        opening: opens MLflow; called in a thread.
        start: the run at its beginning.
        close: how it is closed.

    Raises:
        Unavailable: MLflow does not answer at the beginning.
        StageError: it refuses the run.
    """
    close = close or Close()
    with held_open(start.run):
        run = RecipeRun(start, close.told)
        writer = threading.Thread(target=run.open_and_follow, args=(opening, close), name="mlflow", daemon=True)
        writer.start()
        error: BaseException | None = None
        try:
            yield run
            run.opened.result()
        except BaseException as caught:
            error = _cause(run, caught)
            if error is not caught:
                raise error from caught
            raise
        finally:
            run.closed.set()
            _closed(run, close, error, writer)


def _cause(run: RecipeRun, error: BaseException) -> BaseException:
    """Why a run ended: where its steps were stopped, since MLflow could not be opened; a step's own error stands."""
    echo = isinstance(error, Interrupted) and run.opened.done()
    return (run.opened.exception() if echo else None) or error


def _created(tracking: Tracking, run: RecipeRun, *, again: bool) -> str:
    """MLflow's run of a recipe run. The answer to an earlier try may be what was lost."""
    start = run.start
    if again:
        known = tracking.client.search_runs([tracking.experiment_id], f"tags.`{RUN}` = '{start.run}'", max_results=1)
        if known:
            return str(known[0].info.run_id)
    ours = {RUN: start.run, "enginery.recipe": start.recipe, **process_tags(os.getpid())}
    tags = {**_source(), **ours, **start.tags}
    made = tracking.client.create_run(tracking.experiment_id, run.began_ms, tags, start.recipe)
    return str(made.info.run_id)


def _closed(run: RecipeRun, close: Close, error: BaseException | None, writer: threading.Thread) -> None:
    ended_ms = int(time.time() * 1000)

    def settled() -> None:
        writer.join()
        if run.opened.exception() is None:
            run.settle(close.end(run.tracking, run.id, error), ended_ms)

    try:
        if isinstance(error, KeyboardInterrupt | Interrupted):
            _within(settled, HURRY_S)
        elif isinstance(error, Unavailable):
            _within(settled, _LAST_TRY_S)
        else:
            close.again(settled)
    # Any error: what the run came to is on record, or on its way as an error of its own.
    except Exception as broken:  # noqa: BLE001
        if run.opened.done():
            close.told("the end of MLflow's run", broken)
    finally:
        run.given_up.set()


def _within(do: Callable[[], None], limit_s: float) -> None:
    """Do it in a thread that is left behind when it takes longer: a call to a server that hangs cannot be ended."""
    broken: list[Exception] = []

    def kept() -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - raised below
            broken.append(error)

    thread = threading.Thread(target=kept, name="mlflow-end", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise Unavailable("MLflow did not answer in time", limit=f"{limit_s:g} s")
    for error in broken:
        raise error


def _source() -> dict[str, str]:
    return {"mlflow.source.name": "enginery", "mlflow.source.type": "LOCAL"}
