"""What Prefect's pages show: a step's notes and bar, and what a run came to."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

if TYPE_CHECKING:
    from uuid import UUID

    from flows.results import RunResult, StepResult
    from flows.running.session import Session

_BAR_S = 5.0


class RunLog:
    """A step's notes as lines of its Prefect run."""

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


class Bar:
    """A step's bar on its run's page. It is for the eye: a server that is away for a moment stops no stage."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._artifact: UUID | None = None
        self._shown = 0.0

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        now = time.monotonic()
        if total <= 0 or (now - self._shown < _BAR_S and done < total):
            return
        self._shown = now
        share = 100 * min(1.0, done / total)
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(share, description=self._description)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._artifact, share)
        except httpx.HTTPError:
            return

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""

    def note(self, text: str) -> None:
        """See Progress."""


def show(session: Session, result: RunResult) -> None:
    """The result on the flow run's page: the table of steps, the verdict, the links."""
    # One key a recipe: Prefect keeps the versions of an artifact under its key, the last one first.
    key = "".join(c if c.isalnum() else "-" for c in session.recipe.name.lower()).strip("-")
    rows = [_row(step) for step in result.steps]
    create_table_artifact(rows, key=f"steps-{key}", description=f"Steps of {session.recipe.name}")
    said = [f"- {gate.text}" for gate in result.gates]
    verdict = "passed" if result.passed else "failed"
    model = f"\n\nRegistered: {result.model.name} version {result.model.version}" if result.model else ""
    create_markdown_artifact(
        f"# {session.recipe.name}: {verdict}\n\n" + "\n".join(said) + model, key=f"verdict-{key}", description="Verdict"
    )
    mlflow = session.tracking.link(session.mlflow.id)
    report = f"file://{result.report}"
    if mlflow.startswith("http"):
        create_link_artifact(mlflow, link_text="MLflow run", key=f"mlflow-{key}", description="MLflow")
        report = f"{mlflow}/artifacts/report.html"
    create_link_artifact(report, link_text="report", key=f"report-{key}", description="HTML report")


def page_of(flow_run_id: str) -> str:
    """Where a person sees a flow run; empty without a server."""
    from prefect.settings import PREFECT_UI_URL

    url = os.environ.get("ENGINERY_PREFECT_PAGES") or PREFECT_UI_URL.value()
    return f"{url.rstrip('/')}/runs/flow-run/{flow_run_id}" if url else ""


def _row(step: StepResult) -> dict[str, object]:
    return {
        "step": step.name,
        "stage": step.stage,
        "seconds": step.seconds,
        "cached": step.cached,
        "size, MB": round(step.metrics.get("size_bytes", 0.0) / 1e6, 1),
        "perplexity": round(step.metrics.get("perplexity", 0.0), 3) or "",
        "fingerprint": step.fingerprint[:12],
    }
