"""What a flow run's page shows when it has ended: the table of steps, the verdict, the links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

if TYPE_CHECKING:
    from flows.results import RunResult, StepResult
    from flows.running.session import Session


def show(session: Session, result: RunResult) -> None:
    """The result on the flow run's page: the table of steps, the verdict, the links."""
    # One key a recipe: Prefect keeps the versions of an artifact under its key, the last one first.
    key = "".join(c if c.isalnum() else "-" for c in session.recipe.name.lower()).strip("-")
    rows = [_row(step) for step in result.steps]
    create_table_artifact(rows, key=f"steps-{key}", description=f"Steps of {session.recipe.name}")
    said = [f"- {gate.said}" for gate in result.gates] or [result.unjudged.capitalize() + "."]
    model = f"\n\nRegistered: {result.model.name} version {result.model.version}" if result.model else ""
    create_markdown_artifact(
        f"# {session.recipe.name}: {result.verdict}\n\n" + "\n".join(said) + model,
        key=f"verdict-{key}",
        description="Verdict",
    )
    mlflow = session.tracking.link(session.mlflow.id)
    report = f"file://{result.report}"
    if mlflow.startswith("http"):
        create_link_artifact(mlflow, link_text="MLflow run", key=f"mlflow-{key}", description="MLflow")
        report = f"{mlflow}/artifacts/report.html"
    create_link_artifact(report, link_text="report", key=f"report-{key}", description="HTML report")


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
