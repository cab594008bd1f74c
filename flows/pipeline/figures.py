"""What MLflow's run of a recipe run shows at a glance: measures as metrics, facts as tags."""

from __future__ import annotations

from flows.judging.measured import CHAMPION
from flows.pipeline.verdict import Judgement
from flows.reporting.abilities import ItemSet, item_sets
from flows.results import RunResult
from flows.running.session import Session
from flows.tracking.model_metrics import ModelMetric
from stages.measures.table import SPEED


def metrics(session: Session, judgement: Judgement, result: RunResult) -> dict[str, float]:
    """Metrics by name.

    `perplexity.text` is of the engine that an alias would serve, `champion.perplexity.text` of the one it serves,
    `cpu/perplexity.text` of each judged artifact and of the baseline; `gate/...` is what a gate looked at. So it is
    with speeds: `decode_tokens_per_s`, `cpu/decode_tokens_per_s` and `cpu/decode_tokens_per_s of dense`, the ratio.
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
    found |= _speeds(judgement)
    for gate in result.gates:
        if gate.measured is not None:
            named = [gate.measure, gate.artifact, gate.corpus, "worst" if gate.worst else gate.slice]
            named += [f"against {gate.against}" if gate.against else ""]
            found["gate/" + ".".join(filter(None, named))] = gate.measured
    return found


def _speeds(judgement: Judgement) -> dict[str, float]:
    found: dict[str, float] = {}
    for (artifact, baseline), report in judgement.speeds.items():
        said = report[SPEED]
        found |= {f"{artifact}/{name}": value for name, value in said["artifact"]["measures"].items()}
        found |= {f"{artifact}/{name} of {baseline}": three[0] for name, three in said.get("ratios", {}).items()}
        for name, value in said.get("baseline", {}).get("measures", {}).items():
            found.setdefault(f"{baseline}/{name}", value)  # as it was first measured
    return found | _served_speeds(judgement)


def _served_speeds(judgement: Judgement) -> dict[str, float]:
    """Of the engine that an alias would serve, with the ratios to the baseline and the ends of their intervals."""
    found: dict[str, float] = {}
    for (artifact, baseline), report in judgement.speeds.items():
        if artifact == judgement.serves:
            found |= report[SPEED]["artifact"]["measures"]
            for name, three in report[SPEED].get("ratios", {}).items():
                ends = zip(("", " low", " high"), three, strict=True)
                found |= {f"{name} of {baseline}{end}": value for end, value in ends}
    return found


def asked_items(session: Session, judgement: Judgement) -> list[ItemSet]:
    """The sets of items that the run's models were asked, beside the dense one and step by step."""
    asked = session.recipe.judge
    if asked is None:
        return []
    return item_sets(judgement.reports, asked.baseline, asked.artifacts, chain(session, judgement))


def chain(session: Session, judgement: Judgement) -> list[str]:
    """From the dense model to the engine that an alias would serve, or to the first artifact that is judged."""
    asked = session.recipe.judge
    return list(session.asked.chains[judgement.serves or asked.artifacts[0]]) if asked else []


def model_metrics(session: Session, judgement: Judgement) -> list[ModelMetric]:
    """What the engine that is served was measured by, each on its dataset, as MLflow's logged model has it.

    Keys are those of the run's own metrics; `accuracy.abilities of dense` is the share of dense's right answers,
    with the ends of its interval.
    """
    serves = judgement.serves
    found = []
    for (artifact, corpus), report in judgement.reports.items():
        if artifact != serves:
            continue
        on = (corpus, session.done[corpus].fingerprint)
        every = {"": report["measures"], **report.get("slices", {})}
        found += [
            ModelMetric(".".join(filter(None, [measure, corpus, name])), value, on)
            for name, measures in every.items()
            for measure, value in measures.items()
            if measure != "size_bytes"
        ]
    for one in asked_items(session, judgement):
        cell = one.abilities[0].cells.get(serves) if one.abilities else None
        if cell and cell.ratio:
            on, key = (one.corpus, session.done[one.corpus].fingerprint), f"accuracy.{one.corpus} of {one.baseline}"
            ends = {"": cell.ratio.point, " low": cell.ratio.low, " high": cell.ratio.high}
            found += [ModelMetric(f"{key}{end}", value, on) for end, value in ends.items()]
    found += [ModelMetric(name, value) for name, value in _served_speeds(judgement).items()]
    return [*found, ModelMetric("size_bytes", session.done[serves].metrics["size_bytes"])]


def tags(result: RunResult) -> dict[str, str]:
    """Tags by name. The seconds are a fact about a machine: as a metric they would be a chart of one bar."""
    return {
        "enginery.verdict": result.verdict,
        "enginery.seconds": f"{result.seconds:.2f}",
        "enginery.executed": ", ".join(result.executed),
        "enginery.compiled": ", ".join(result.compiled),
    }
