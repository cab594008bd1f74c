"""Whether every step of a recipe can take what the steps before it will make, asked before any of them runs.

Configurations, tensor names, shapes and tokenizers are read; no weight is. Run as `python -m stages.admission`: the
request comes as JSON on standard input, the answers go to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from stages import stage
from stages.runtime.contract import Frozen, Kind, Stage, StageError


class Asked(Frozen):
    """One step.

    Attributes:
        name: in the recipe.
        stage: which it is of.
        params: its own.
        inputs: role -> name of the step that it reads.
        folder: where its artifact lies if it is sealed already, empty for one that will be made.
    """

    name: str
    stage: str
    params: dict[str, Any]
    inputs: dict[str, str]
    folder: str = ""


class Answer(Frozen):
    """What a step was found to be able to.

    Attributes:
        step: its name.
        task: what its model is for, empty where it makes none or that is not known.
        refusal: the error's four parts; None where nothing speaks against it.
        unknown: why it could not be looked at.
        facts: of a checkpoint that was read: what `enginery check` shows.
    """

    step: str
    task: str = ""
    refusal: dict[str, str | None] | None = None
    unknown: str = ""
    facts: Mapping[str, str] = Field(default_factory=dict)


def admitted(steps: Sequence[Asked]) -> list[Answer]:
    """Each step's answer; a step that reads a refused one is not asked."""
    made: dict[str, Any] = {}
    answers: list[Answer] = []
    for step in steps:
        definition = stage(step.stage)
        read = {role: made.get(source) for role, source in step.inputs.items()}
        if definition.admit is None or any(read[role] is None for role in read if _is_model(definition, role)):
            answers.append(Answer(step=step.name))
            continue
        params = definition.params.model_validate(step.params)
        try:
            found = definition.admit(params, {**read, **({"": Path(step.folder)} if step.folder else {})})
        except StageError as error:
            answers.append(Answer(step=step.name, refusal=_parts(error)))
            continue
        # Any other error: looking ahead has a defect, and the work itself may well succeed.
        except Exception as error:  # noqa: BLE001
            answers.append(Answer(step=step.name, unknown=f"{type(error).__name__}: {error}"))
            continue
        made[step.name] = found
        facts = {} if step.inputs else getattr(found, "facts", {})
        answers.append(Answer(step=step.name, task=getattr(found, "task", ""), facts=facts))
    return answers


def _is_model(definition: Stage[Any], role: str) -> bool:
    return Kind.CORPUS not in definition.inputs[role.partition(".")[0]].kinds


def _parts(error: StageError) -> dict[str, str | None]:
    measured, limit = (None if one is None else str(one) for one in (error.measured, error.limit))
    return {"what": error.what, "measured": measured, "limit": limit, "remedy": error.remedy}


def main() -> int:
    """Answer the request on standard input."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print at will
    warnings.filterwarnings("ignore")
    request: list[Mapping[str, Any]] = json.load(sys.stdin)
    from stages.models.memory.lean_import import import_transformers

    import_transformers()
    answers = admitted([Asked.model_validate(one) for one in request])
    out.write(json.dumps([one.model_dump(mode="json") for one in answers]))
    out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
