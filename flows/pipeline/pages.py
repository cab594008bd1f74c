"""What a flow run's page shows when it has ended: the table of steps, the verdict, the links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.reporting.verdict_text import described, summary
from stages.measures.table import foremost, title

if TYPE_CHECKING:
    from flows.results import RunResult, StepResult
    from flows.running.session import Session


def show(session: Session, result: RunResult) -> None:
    """The result on the flow run's page: the table of steps, the verdict, the links."""
    # One key a recipe: Prefect keeps the versions of an artifact under its key, the last one first.
    key = "".join(c if c.isalnum() else "-" for c in session.recipe.name.lower()).strip("-")
    shown = foremost(*(step.metrics for step in result.steps))
    rows = [_row(step, shown) for step in result.steps]
    create_table_artifact(rows, key=f"steps-{key}", description=f"Steps of {session.recipe.name}")
    mlflow, report = session.mlflow.tracking.link(session.mlflow.id), f"file://{result.report}"
    page = verdict_page(session.recipe.name, result, mlflow)
    create_markdown_artifact(page, key=f"verdict-{key}", description=summary(result))
    if mlflow.startswith("http"):
        create_link_artifact(mlflow, link_text="MLflow run", key=f"mlflow-{key}", description="MLflow")
        report = f"{mlflow}/artifacts/report.html"
    create_link_artifact(report, link_text="report", key=f"report-{key}", description="HTML report")


def verdict_page(recipe: str, result: RunResult, mlflow: str) -> str:
    """The verdict in Markdown: the state, each gate, what was promoted, where MLflow's run is."""
    where = f"[MLflow's run]({mlflow})" if mlflow.startswith("http") else f"MLflow's run: `{mlflow}`"
    return f"# {recipe}: {result.verdict}\n\n{described(result)}\n\n{where}\n"


def _row(step: StepResult, shown: str) -> dict[str, object]:
    return {
        "step": step.name,
        "stage": step.stage,
        "seconds": step.seconds,
        "cached": step.cached,
        "size, MB": round(step.metrics.get("size_bytes", 0.0) / 1e6, 1),
        title(shown): round(step.metrics.get(shown, 0.0), 3) or "",
        "fingerprint": step.fingerprint[:12],
    }
