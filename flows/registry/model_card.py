"""The model card of a registered version: what it is, what it was held to, how it stands beside the champion.

Markdown, which MLflow shows as the version's description.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flows.registry.card_abilities import sections
from flows.registry.journal import Candidate
from flows.registry.package import example
from flows.reporting.abilities import ItemSet
from flows.reporting.format import markdown_table, number, size
from flows.reporting.timed_steps import timed
from flows.results import GateResult, RunResult, StepResult
from stages.measures.table import SPEEDS, foremost, title

CARD = "model_card.md"
"""Among the files of MLflow's run: the whole card."""
DESCRIBED = 5000
"""Characters that MLflow's tables have for a version's description; PostgreSQL refuses more."""
_REST = f"The rest stands in `{CARD}` among the files of the run."


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


def about_model(model: str, task: str) -> str:
    """What MLflow's page of a registered model says of all its versions, and how one of its task is asked."""
    return (
        "Versions that held the gates of an Enginery recipe. Each carries its engine and tokenizer; its description is "
        "its model card.\n\nAn alias follows the promotion journal in Enginery's store. Move it by "
        f"`enginery promote {model} VERSION` or `enginery rollback {model}`: one that is moved by hand is put back.\n\n"
        f'```python\nmodel = mlflow.pyfunc.load_model("models:/{model}@champion")\n'
        f"model.predict({json.dumps(example(task))})\n```\n"
    )


def card(
    candidate: Candidate,
    recipe: str,
    result: RunResult,
    items: Sequence[ItemSet],
    beside: Sequence[Compared],
    champion: str,
) -> str:
    """The card.

    Args:
        candidate: what is registered.
        recipe: name of the recipe.
        result: of the run.
        items: the sets of items that it was asked.
        beside: the measures of the engine that is served, and the champion's.
        champion: number of the version that stood before, empty for none.
    """
    steps = result.steps
    sizes = {step.name: size(step.metrics.get("size_bytes", 0.0)) for step in steps}
    served = candidate.executables[candidate.serves]
    shown = foremost(*(step.metrics for step in steps))
    parts = [
        f"# {candidate.model}",
        f"Made by run `{result.run}` of recipe `{recipe}`. An alias serves `{candidate.serves}` on `{served.target}`.",
        markdown_table(
            ("engine", "target", "status", "size"),
            [(name, one.target, one.status, sizes[name]) for name, one in candidate.executables.items()],
        ),
        "## Gates",
        _gates(result.gates),
        f"## Beside the champion, version {champion}" if champion else "## Measured; there was no champion",
        _beside(beside),
        *_speed(candidate.serves, steps),
        *(part for one in items for part in sections(one)),
        "## Steps",
        markdown_table(
            ("step", "stage", "size", title(shown), "fingerprint"),
            [
                (step.name, step.stage, sizes[step.name], number(step.metrics.get(shown)), step.fingerprint[:12])
                for step in steps
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def described(card: str) -> str:
    """As much of a card as MLflow has room for: whole sections, in their order, and where the rest stands."""
    if len(card) <= DESCRIBED:
        return card
    first, *more = card.rstrip("\n").split("\n\n## ")
    kept, room = first[: DESCRIBED - len(_REST) - 2], DESCRIBED - len(_REST) - 2
    for part in more:
        if len(kept) + len(part) + 5 <= room:
            kept += f"\n\n## {part}"
    return f"{kept}\n\n{_REST}"


def _gates(gates: Sequence[GateResult]) -> str:
    return markdown_table(
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
    return markdown_table(
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


def _speed(serves: str, steps: Sequence[StepResult]) -> Iterator[str]:
    """How fast the engine is that is served, on the device where it was measured."""
    for device, measured in timed(steps).items():
        for step in measured:
            if step.measures == serves:
                yield f"## Speed on {device}"
                names = [name for name in SPEEDS if name in step.metrics]
                rows = [(name, number(step.metrics[name]), number(step.metrics.get(f"{name}_ratio"))) for name in names]
                yield markdown_table(("measure", "this version", "of the baseline's"), rows)


def _against(gate: GateResult) -> str:
    return f"{gate.measure} / {gate.against}" if gate.against else gate.measure
