"""The Prefect flow: a recipe's steps as task runs, then verdict, registry and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

from prefect import flow, get_run_logger, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.pipeline.champion import facing
from flows.pipeline.pages import show
from flows.pipeline.slices import check_slices
from flows.pipeline.steps import AGAIN_S, STEPS_AT_ONCE, end, keep, raise_first, same, stop
from flows.prefect_api.flow_run_tag import OURS
from flows.prefect_api.leases import outlast_lost_slots
from flows.prefect_api.progress import RunLog
from flows.prefect_api.retry import await_api
from flows.recipe.check import check_recipe
from flows.recipe.expand import expanded
from flows.recipe.model import Recipe
from flows.recipe.read import load_recipe
from flows.reporting.terminal import TerminalProgress
from flows.reporting.verdict_text import summary
from flows.results import RunResult
from flows.running.placement import judging_gpu
from flows.running.session import Session, opened, run_step
from flows.settings import settle
from stages.runtime.contract import Interrupted, StageError, Unavailable

_SESSIONS: dict[str, Session] = {}
"""Sessions of this process by run name: a task's parameters must be plain data, and an open store is not."""


@dataclass
class _Asked:
    """A run that the command line has opened, and what its flow run came to."""

    session: Session
    result: RunResult | None = None
    error: BaseException | None = None


_ASKED: ContextVar[_Asked | None] = ContextVar("asked", default=None)
"""The run that this thread's flow run is of; none where a worker started it."""

outlast_lost_slots()
RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=STEPS_AT_ONCE))


def as_flow(session: Session) -> RunResult:
    """Drive an open run as a flow run of the Prefect server that is named.

    Raises:
        StageError: a step's own.
        KeyboardInterrupt: stopped by a person; the flow run is cancelled.
    """
    asked = _Asked(session)
    token = _ASKED.set(asked)
    try:
        with tags(OURS):
            optimize_recipe(session.recipe, return_state=True)
    except Exception as error:
        if not session.ended:
            raise
        # It may have promoted: Prefect's end of the flow run does not undo that.
        session.loose.tell(error, "the end of Prefect's flow run", same(session))
    finally:
        _ASKED.reset(token)
    if session.ended:
        return session.ended[-1]
    if asked.error:
        raise asked.error
    raise StageError("Prefect did not run the flow", remedy="Look at the flow run's log.")


def recipe_of_run() -> str:
    """The name of a flow run: its recipe's."""
    recipe = flow_run.get_parameters()["recipe"]
    return recipe.name if isinstance(recipe, Recipe) else str(recipe).rpartition("/")[2].removesuffix(".yaml")


@flow(name="optimize", flow_run_name=recipe_of_run, task_runner=RUNNER)
def optimize_recipe(
    recipe: Recipe | str,
    sets: list[str] | None = None,
    force: list[str] | None = None,
    from_step: str | None = None,
) -> dict[str, Any] | State[Any]:
    """Optimize a model as a recipe says: its steps, the verdict, the promotion.

    Args:
        recipe: what to do: the name of a shipped recipe, the s3:// URI of its YAML, or the recipe itself.
        sets: changes to single values of a recipe that is named, as in `steps.int8.params.scheme=int4_weight_only`.
        force: steps to make again.
        from_step: a step to make again with all that read it.
    """
    asked = _ASKED.get()
    if asked is None:
        return drive(as_recipe(recipe, sets or (), judging_gpu(settle())), force or (), from_step)
    try:
        asked.result = _driven(asked.session)
    except KeyboardInterrupt as error:
        asked.error = error
        return Cancelled(message="interrupted: what is sealed stays")
    except Exception as error:
        asked.error = error
        raise
    return _state(asked.result)


def as_recipe(given: Recipe | str, sets: Sequence[str] = (), gpu: str | None = None) -> Recipe:
    """The recipe that a flow's parameter names or is, checked; `gpu` as of `load_recipe`.

    Raises:
        RecipeError: it is missing or wrong.
    """
    if isinstance(given, str):
        return load_recipe(given, sets, gpu)
    if sets:
        raise StageError("`sets` change a recipe that is named", remedy="Change the recipe that is given itself.")
    check_recipe(given, gpu)
    return given


def drive(recipe: Recipe, force: Sequence[str] = (), from_step: str | None = None) -> dict[str, Any] | State[Any]:
    """Run a recipe inside the flow run that goes on; returns its RunResult as JSON values, or the flow run's state."""
    settings = replace(settle(), force=frozenset(force), from_step=from_step)
    asked = expanded(recipe, judging_gpu(settings))
    with TerminalProgress() as terminal, opened(asked, settings, terminal, facing) as session:
        state = _state(_driven(session))
    await_api(str(flow_run.id))
    return state


def _state(result: RunResult) -> dict[str, Any] | State[Any]:
    """What a flow run ends as: a failed gate is a failure, with the gate, what was measured and the limit."""
    if result.passed:
        return result.model_dump(mode="json")
    return Failed(message=summary(result))


def _driven(session: Session) -> RunResult:
    session.mlflow.opened.result()
    futures: dict[str, PrefectFuture[Any]] = {}
    _SESSIONS[session.record.name] = session
    try:
        for name, planned in session.planned.items():
            named = _step.with_options(name=name, task_run_name=name)
            after = [futures[one] for one in planned.after]
            # Without tags: for each of them Prefect asks its API for a slot, and a step begins while that is away, too.
            with TagsContext(current_tags=set()):
                futures[name] = named.submit(session.record.name, name, wait_for=after, return_state=False)
        _await(session, futures)
        return end(session, lambda result: show(session, result))
    except BaseException as error:
        stop(session, error)
        raise
    finally:
        del _SESSIONS[session.record.name]


def _await(session: Session, futures: Mapping[str, PrefectFuture[Any]]) -> None:
    """Wait for every step; raise the first error that is a step's own."""
    for future in futures.values():
        future.wait()
    broken = [name for name, future in futures.items() if not future.state.is_completed()]
    raise_first(session, broken)
    if broken:
        raise StageError(f"Prefect did not run {', '.join(broken)}", remedy="Look at the flow run's log.")


def _infrastructure(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unavailable)


@task(retries=len(AGAIN_S), retry_delay_seconds=[*AGAIN_S], retry_condition_fn=_infrastructure, cache_policy=NO_CACHE)
def _step(run: str, name: str) -> str | State[Any]:
    """One step to its sealed artifact; returns its fingerprint."""
    session = _SESSIONS[run]
    try:
        made = run_step(session, name, RunLog(get_run_logger())).fingerprint
        check_slices(session, name)
        return made
    except Interrupted as error:
        keep(session, name, error)
        return Cancelled(message=str(error))
    except BaseException as error:
        keep(session, name, error)
        raise
