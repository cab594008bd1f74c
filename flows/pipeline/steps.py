"""A run's steps in threads of this process, and the end that every run has, whoever drives its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Event

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_chain, wait_fixed
from tenacity.nap import sleep_using_event

from flows.pipeline.champion import champion_of, measured
from flows.pipeline.finish import finish
from flows.pipeline.slices import check_slices
from flows.pipeline.verdict import Judgement, judged
from flows.prefect_api.retry import AWAY_S, patiently
from flows.registry.journal import Overtaken
from flows.results import RunResult
from flows.running.interruption import unwinding
from flows.running.session import Session, run_step
from stages.runtime.contract import Interrupted, Unavailable

STEPS_AT_ONCE = 64
"""Threads, nearly all of which wait: for the steps they read, or for a slot."""
VERDICTS = 5
"""So often at most a run is judged that others overtake: each time another has promoted something."""
AGAIN_S = (2, 10, 30)
"""Pauses before a step whose source, store or tracking was away is tried again."""


def run_steps(session: Session) -> None:
    """Bring every step to its artifact, each as soon as those that it reads are there.

    Raises:
        StageError: a step's own; the others that ran came to their end, none was started after it.
    """
    steps: dict[str, Future[None]] = {}
    stopping = Event()
    # In the recipe's order: a step waits in a thread only for steps that have one already.
    with ThreadPoolExecutor(STEPS_AT_ONCE, thread_name_prefix="step") as threads:
        try:
            for name, planned in session.planned.items():
                steps[name] = threads.submit(_step, session, name, [steps[one] for one in planned.after], stopping)
            wait(steps.values())
        except BaseException as error:
            stopping.set()
            stop(session, error)
            raise
    raise_first(session, steps)


def stop(session: Session, error: BaseException) -> None:
    """End the steps that run. A person who asked for it need not ask again."""
    if isinstance(error, KeyboardInterrupt):
        unwinding()
    session.launcher.stop()


def raise_first(session: Session, names: Iterable[str]) -> None:
    """Raise the first error of these steps that is a step's own and not the echo of another's."""
    errors = [session.errors[name] for name in names if name in session.errors]
    for error in [*(one for one in errors if not isinstance(one, Interrupted)), *errors]:
        raise error


def keep(session: Session, name: str, error: BaseException) -> None:
    """Keep a step's error for the run's end; no other step is started, unless this one may be tried again."""
    session.errors[name] = error
    if not isinstance(error, Unavailable):
        session.launcher.start_no_more()


def end(session: Session, shown: Callable[[RunResult], None] | None = None) -> RunResult:
    """Verdict, end, pages.

    Args:
        session: whose steps are done.
        shown: puts the result where people look; what breaks there is told.
    """
    session.mlflow.opened.result()  # whose error is final
    result = _concluded(session)
    if shown:
        with session.loose.told("the flow run's page in Prefect", same(session)):
            shown(result)
    return result


def _concluded(session: Session) -> RunResult:
    """The verdict against the champion that stands, and the end; again where another was promoted meanwhile.

    Where a service is away, only the end is tried again: a second verdict might compare a model with itself, promoted.
    """
    for left in reversed(range(VERDICTS)):
        met, judgement = patiently(partial(_judged, session), away_s=AWAY_S, say=session.terminal.line)
        try:
            return patiently(partial(finish, met, judgement), away_s=AWAY_S, say=session.terminal.line)
        except Overtaken as error:
            if not left:
                raise
            session.loose.heard(f"{error.what} ({error.measured}): it is judged against that")
    raise AssertionError


def _judged(session: Session) -> tuple[Session, Judgement]:
    champion = champion_of(session.recipe, session.store)
    met = measured(session, champion)
    return met, judged(met, champion)


def same(session: Session) -> str:
    """Where a run's result stands besides."""
    return f"The report and `enginery explain {session.record.name}` say the same."


def _step(session: Session, name: str, after: list[Future[None]], stopping: Event) -> None:
    wait(after)
    if any(one.exception() for one in after):
        raise Interrupted(f"step {name} was not started: a step that it reads has failed")
    again = Retrying(
        retry=retry_if_exception_type(Unavailable),
        stop=stop_after_attempt(1 + len(AGAIN_S)),
        wait=wait_chain(*(wait_fixed(pause) for pause in AGAIN_S)),
        sleep=sleep_using_event(stopping),
        reraise=True,
    )
    try:
        again(_made, session, name)
    except BaseException as error:
        session.errors[name] = error
        session.launcher.start_no_more()
        raise


def _made(session: Session, name: str) -> None:
    run_step(session, name)
    check_slices(session, name)
