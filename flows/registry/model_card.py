"""The model card of a registered version: what it is, what it was held to, how it stands beside the champion.

Markdown, which MLflow shows as the version's description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flows.registry.journal import Candidate
from flows.reporting.format import number, size
from flows.results import GateResult, StepResult
from stages.measures.table import foremost, title


@dataclass(frozen=True)
class Compared:
    """One measure of the engine that is served, and of the champion's.

    Attributes:
        corpus: the text it was measured on; empty for what needs none.
        champion: None where there is no champion, or it was not measured on this text.
    """

    measure: str
    corpus: str
    challenger: float
    champion: float | None

    @property
    def key(self) -> str:
        """The measure's name among metrics."""
        return ".".join(filter(None, [self.measure, self.corpus]))


def compared(
    challenger: Mapping[str, Mapping[str, float]], champion: Mapping[str, Mapping[str, float]]
) -> list[Compared]:
    """Every measure of the challenger beside the champion's.

    Args:
        challenger: corpus -> measures.
        champion: the same, with what is known of it.
    """
    return [
        Compared(measure, corpus, value, champion.get(corpus, {}).get(measure))
        for corpus, measures in challenger.items()
        for measure, value in sorted(measures.items())
    ]


def about_model(model: str) -> str:
    """What MLflow's page of a registered model says of all its versions."""
    return (
        "Versions that held the gates of an Enginery recipe. Each carries its engine and tokenizer; its description is "
        "its model card.\n\nAn alias follows the promotion journal in Enginery's store. Move it by "
        f"`enginery promote {model} VERSION` or `enginery rollback {model}`: one that is moved by hand is put back.\n\n"
        f'```python\nmodel = mlflow.pyfunc.load_model("models:/{model}@champion")\n'
        'model.predict(["The capital of France is"])\n```\n'
    )


def card(
    candidate: Candidate,
    recipe: str,
    run: str,
    steps: Sequence[StepResult],
    gates: Sequence[GateResult],
    beside: Sequence[Compared],
    champion: str,
) -> str:
    """The card.

    Args:
        candidate: what is registered.
        recipe: name of the recipe.
        run: name of the run.
        steps: of the run, in order.
        gates: as they were applied.
        beside: the measures of the engine that is served, and the champion's.
        champion: number of the version that stood before, empty for none.
    """
    sizes = {step.name: size(step.metrics.get("size_bytes", 0.0)) for step in steps}
    served = candidate.executables[candidate.serves]
    shown = foremost(*(step.metrics for step in steps))
    parts = [
        f"# {candidate.model}",
        f"Made by run `{run}` of recipe `{recipe}`. An alias serves `{candidate.serves}` on `{served.target}`.",
        _table(
            ("engine", "target", "status", "size"),
            [(name, one.target, one.status, sizes[name]) for name, one in candidate.executables.items()],
        ),
        "## Gates",
        _gates(gates),
        f"## Beside the champion, version {champion}" if champion else "## Measured; there was no champion",
        _beside(beside),
        "## Steps",
        _table(
            ("step", "stage", "size", title(shown), "fingerprint"),
            [
                (step.name, step.stage, sizes[step.name], number(step.metrics.get(shown)), step.fingerprint[:12])
                for step in steps
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _gates(gates: Sequence[GateResult]) -> str:
    return _table(
        ("measure", "artifact", "text", "measured", "interval", "limit", "result"),
        [
            (
                _against(gate),
                gate.artifact,
                (gate.corpus or "-") + (f": {gate.slice}" if gate.slice else ""),
                number(gate.measured),
                f"{number(gate.low)}..{number(gate.high)}" if gate.low is not None else "-",
                f"{gate.bound.replace('_', ' ')} {number(gate.limit)}",
                gate.state,
            )
            for gate in gates
        ],
    )


def _beside(beside: Sequence[Compared]) -> str:
    return _table(
        ("measure", "text", "this version", "champion", "ratio"),
        [
            (
                one.measure,
                one.corpus or "-",
                number(one.challenger),
                number(one.champion),
                number(one.challenger / one.champion) if one.champion else "-",
            )
            for one in beside
        ],
    )


def _against(gate: GateResult) -> str:
    return f"{gate.measure} / {gate.against}" if gate.against else gate.measure


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
