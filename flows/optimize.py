"""The Prefect flow: a recipe's steps as task runs, then verdict, registry and report."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.recipe import Recipe
from flows.results import RunResult
from flows.session import Session, Terminal, conclude, opened, plan, run_step
from flows.settings import Settings, settle
from flows.terminal import TerminalProgress
from stages.runtime.contract import Interrupted, StageError, Unavailable

__all__ = ["optimize", "optimize_recipe", "plan"]

_SESSIONS: dict[str, Session] = {}
"""Sessions of this process by run name: a flow's parameters must be plain data, and an open store is not."""

_STEPS_AT_ONCE = 64
"""Threads, nearly all of which wait: for the steps they read, or for a slot."""


def optimize(recipe: Recipe, settings: Settings, terminal: Terminal) -> RunResult:
    """Run a recipe and return what it came to.

    Without a Prefect server a run starts a temporary one, which costs about ten seconds; a run whose every step is
    sealed has no task to run and skips it.

    Raises:
        StageError: a step failed; everything sealed before stays.
        KeyboardInterrupt: stopped by a person; running steps were ended.
    """
    with opened(recipe, settings, terminal) as session:
        if session.nothing_to_run and not os.environ.get("PREFECT_API_URL"):
            for name in session.planned:
                run_step(session, name)
            return conclude(session)
        _SESSIONS[session.record.name] = session
        try:
            return RunResult.model_validate(optimize_recipe(recipe, session.record.name))
        except RuntimeError as error:
            # Prefect has no class of its own for a temporary server that did not come up.
            if "ephemeral Prefect API server" not in str(error):
                raise
            raise Unavailable(
                "Prefect's temporary server did not start in time",
                limit=f"{os.environ.get('PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS')} s",
                remedy="Run again when the machine is less busy, or name a server with PREFECT_API_URL.",
            ) from error
        finally:
            del _SESSIONS[session.record.name]


_RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=_STEPS_AT_ONCE))


@flow(name="optimize", flow_run_name="{recipe.name}", task_runner=_RUNNER)
def optimize_recipe(recipe: Recipe, run: str = "") -> dict[str, Any]:
    """Optimize a model as a recipe says: its steps, the verdict, the promotion.

    Args:
        recipe: what to do; its form stands on this page.
        run: name of a run that was opened by the command line; empty for one that begins here.
    """
    if run in _SESSIONS:
        return _driven(_SESSIONS[run])
    recipe.check()
    with TerminalProgress() as terminal, opened(recipe, settle(), terminal) as session:
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
        result = conclude(session)
        _show(session, result)
    except BaseException:
        session.launcher.stop()
        raise
    return result.model_dump(mode="json")


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


class RunLog:
    """A step's notes as lines of its Prefect task run."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._logger = logger
        self._tenth = 0

    def advanced(self, done: float, total: float) -> None:
        """See Progress. A line each tenth."""
        tenth = int(10 * done / total) if total else 0
        if tenth > self._tenth:
            self._tenth = tenth
            self._logger.info("%d%%", 10 * tenth)

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress. Curves are MLflow's."""

    def note(self, text: str) -> None:
        """See Progress."""
        self._logger.info(text)


def _show(session: Session, result: RunResult) -> None:
    """The result on Prefect's page: the table of steps, the verdict, the links."""
    key = "".join(c if c.isalnum() else "-" for c in result.run.lower())
    rows = [
        {
            "step": step.name,
            "stage": step.stage,
            "seconds": step.seconds,
            "cached": step.cached,
            "size, MB": round(step.metrics.get("size_bytes", 0.0) / 1e6, 1),
            "perplexity": round(step.metrics.get("perplexity", 0.0), 3) or "",
            "fingerprint": step.fingerprint[:12],
        }
        for step in result.steps
    ]
    create_table_artifact(rows, key=f"steps-{key}", description=f"Steps of {session.recipe.name}")
    said = [f"- {gate.text}" for gate in result.gates]
    verdict = "passed" if result.passed else "failed"
    model = f"\n\nRegistered: {result.model.name} version {result.model.version}" if result.model else ""
    create_markdown_artifact(
        f"# {session.recipe.name}: {verdict}\n\n" + "\n".join(said) + model, key=f"verdict-{key}", description="Verdict"
    )
    create_link_artifact(f"file://{result.report}", link_text="report", key=f"report-{key}", description="HTML report")
    mlflow = session.tracking.link(session.mlflow.id)
    if mlflow.startswith("http"):
        create_link_artifact(mlflow, link_text="MLflow run", key=f"mlflow-{key}", description="MLflow")
