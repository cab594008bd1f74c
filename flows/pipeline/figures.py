"""What MLflow's run of a recipe run shows at a glance: measures as metrics, facts as tags."""

from __future__ import annotations

from flows.judging.measured import CHAMPION
from flows.pipeline.verdict import Judgement
from flows.results import RunResult
from flows.running.session import Session


def metrics(session: Session, judgement: Judgement, result: RunResult) -> dict[str, float]:
    """Metrics by name.

    `perplexity.text` is of the engine that an alias would serve, `champion.perplexity.text` of the one it serves,
    `cpu/perplexity.text` of each judged artifact and of the baseline; `gate/...` is what a gate looked at.
    """
    found = {one.key: one.challenger for one in judgement.beside}
    found |= {f"champion.{one.key}": one.champion for one in judgement.beside if one.champion is not None}
    asked = session.recipe.judge
    judged = [*asked.artifacts, asked.baseline] if asked else []
    for (artifact, corpus), report in judgement.reports.items():
        if artifact in judged and artifact != CHAMPION:
            found |= {f"{artifact}/{measure}.{corpus}": value for measure, value in report["measures"].items()}
            for name, of in report.get("slices", {}).items():
                found |= {f"{artifact}/{measure}.{corpus}.{name}": value for measure, value in of.items()}
    found |= {f"{name}/size_bytes": session.done[name].metrics["size_bytes"] for name in judged}
    for gate in result.gates:
        if gate.measured is not None:
            named = [gate.measure, gate.artifact, gate.corpus, "worst" if gate.worst else gate.slice]
            named += [f"against {gate.against}" if gate.against else ""]
            found["gate/" + ".".join(filter(None, named))] = gate.measured
    return found


def tags(result: RunResult) -> dict[str, str]:
    """Tags by name. The seconds are a fact about a machine: as a metric they would be a chart of one bar."""
    return {
        "enginery.verdict": result.verdict,
        "enginery.seconds": f"{result.seconds:.2f}",
        "enginery.executed": ", ".join(result.executed),
        "enginery.compiled": ", ".join(result.compiled),
    }
