"""The Prefect flow: a recipe's steps as task runs, then verdict, registry and report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from prefect import flow, get_run_logger, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.pipeline.finish import finish
from flows.pipeline.pages import show
from flows.pipeline.verdict import judged
from flows.prefect_api.flow_run_tag import OURS
from flows.prefect_api.progress import RunLog
from flows.prefect_api.retry import patiently
from flows.recipe.check import check_recipe
from flows.recipe.expand import Expanded, expanded
from flows.recipe.model import Recipe
from flows.recipe.read import load_recipe
from flows.reporting.terminal import TerminalProgress
from flows.results import RunResult
from flows.running.session import Session, Terminal, opened, run_step
from flows.settings import Settings, settle
from stages.runtime.contract import Interrupted, StageError, Unavailable

_SESSIONS: dict[str, Session] = {}
"""Sessions of this process by run name: a flow's parameters must be plain data, and an open store is not."""

_STEPS_AT_ONCE = 64
"""Threads, nearly all of which wait: for the steps they read, or for a slot."""


def optimize(asked: Expanded, settings: Settings, terminal: Terminal) -> RunResult:
    """Run a recipe and return what it came to.

    Without a Prefect server a run starts a temporary one, which costs about ten seconds; a run whose every step is
    sealed has no task to run and skips it.

    Raises:
        StageError: a step failed; everything sealed before stays.
        KeyboardInterrupt: stopped by a person; running steps were ended.
    """
    with opened(asked, settings, terminal) as session:
        if session.nothing_to_run and not os.environ.get("PREFECT_API_URL"):
            for name in session.planned:
                run_step(session, name)
            return finish(session, judged(session))
        _SESSIONS[session.record.name] = session
        try:
            with tags(OURS):
                return RunResult.model_validate(optimize_recipe(asked.recipe, session.record.name))
        except Exception as error:
            if session.ended:  # it may have promoted: Prefect's end of the flow run does not undo that
                session.loose.tell(error, "the end of Prefect's flow run", _same(session))
                return session.ended[-1]
            # Prefect has no class of its own for a temporary server that did not come up.
            if not isinstance(error, RuntimeError) or "ephemeral Prefect API server" not in str(error):
                raise
            raise Unavailable(
                "Prefect's temporary server did not start in time",
                limit=f"{os.environ.get('PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS')} s",
                remedy="Run again when the machine is less busy, or name a server with PREFECT_API_URL.",
            ) from error
        finally:
            del _SESSIONS[session.record.name]


RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=_STEPS_AT_ONCE))


def recipe_of_run() -> str:
    """The name of a flow run: its recipe's."""
    recipe = flow_run.get_parameters()["recipe"]
    return recipe.name if isinstance(recipe, Recipe) else str(recipe).rpartition("/")[2].removesuffix(".yaml")


@flow(name="optimize", flow_run_name=recipe_of_run, task_runner=RUNNER)
def optimize_recipe(recipe: Recipe | str, run: str = "") -> dict[str, Any]:
    """Optimize a model as a recipe says: its steps, the verdict, the promotion.

    Args:
        recipe: what to do: the name of a shipped recipe, the s3:// URI of its YAML, or the recipe itself.
        run: name of a run that was opened by the command line; empty for one that begins here.
    """
    if run in _SESSIONS:
        return _driven(_SESSIONS[run])
    return drive(as_recipe(recipe))


def as_recipe(given: Recipe | str) -> Recipe:
    """The recipe that a flow's parameter names or is, checked.

    Raises:
        RecipeError: it is missing or wrong.
    """
    recipe = load_recipe(given) if isinstance(given, str) else given
    check_recipe(recipe)
    return recipe


def drive(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe inside the flow run that goes on; returns its RunResult as JSON values."""
    with TerminalProgress() as terminal, opened(expanded(recipe), settle(), terminal) as session:
        _SESSIONS[session.record.name] = session
        try:
            return _driven(session)
        finally:
            del _SESSIONS[session.record.name]


def _driven(session: Session) -> dict[str, Any]:
    futures: dict[str, PrefectFuture[str]] = {}
    try:
        for name, planned in session.planned.items():
            named = _step.with_options(name=name, task_run_name=name, tags={planned.order.stage})
            after = [futures[one] for one in planned.after]
            futures[name] = named.submit(session.record.name, name, wait_for=after, return_state=False)
        _await(session, futures)
        result = _end(session)
    except BaseException:
        session.launcher.stop()
        raise
    return result.model_dump(mode="json")


def _end(session: Session) -> RunResult:
    """Verdict, end, page. Only the end is tried again: a second verdict might compare a model with itself, promoted."""
    judgement = patiently(lambda: judged(session), say=session.terminal.line)
    result = patiently(lambda: finish(session, judgement), say=session.terminal.line)
    with session.loose.told("the flow run's page in Prefect", _same(session)):
        show(session, result)
    return result


def _same(session: Session) -> str:
    return f"The report and `enginery explain {session.record.name}` say the same."


def _await(session: Session, futures: Mapping[str, PrefectFuture[str]]) -> None:
    """Wait for every step; raise the first error that is a step's own and not the echo of another's."""
    for future in futures.values():
        future.wait()
    broken = [name for name, future in futures.items() if not future.state.is_completed()]
    errors = [session.errors[name] for name in broken if name in session.errors]
    own = [error for error in errors if not isinstance(error, Interrupted)]
    for error in own or errors:
        raise error
    if broken:
        raise StageError(f"Prefect did not run {', '.join(broken)}", remedy="Look at the flow run's log.")


def _infrastructure(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unavailable)


@task(retries=3, retry_delay_seconds=[2, 10, 30], retry_condition_fn=_infrastructure, cache_policy=NO_CACHE)
def _step(run: str, name: str) -> str:
    """One step to its sealed artifact; returns its fingerprint."""
    session = _SESSIONS[run]
    try:
        return run_step(session, name, RunLog(get_run_logger())).fingerprint
    except BaseException as error:
        session.errors[name] = error
        if not isinstance(error, Unavailable):
            session.launcher.start_no_more()
        raise
