"""recover: what surgery cost is learned back from the original, and what a held-out text did not gain is not kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.recover.params import RecoverParams
from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Progress, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.checkpoint.subject import Subject


def recover(params: RecoverParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See RecoverParams. Partial state is saved at every check; a resumed run ends in the same bytes.

    `curve.json` holds every score, `layers.json` how far each tensor moved.
    """
    from stages.models.checkpoint.loading import load_model, save_model
    from stages.recover.checks import check
    from stages.recover.held_out import score
    from stages.recover.loop import Plan, take_what_helped, train
    from stages.recover.pair import side_by_side
    from stages.recover.proof import proven, won
    from stages.recover.weight_updates import begin

    check(inputs, params.update)
    saved, partial = load_model(inputs["model"]), output / PARTIAL
    made, held = side_by_side(params, inputs, saved, partial, progress)
    plan = Plan(
        **params.model_dump(include={field.name for field in fields(Plan)}), steps=params.steps(made.window_tokens)
    )

    def start() -> Mapping[str, Tensor]:
        fresh = dict(load_model(inputs["model"]).named_parameters())
        return begin(params.update, {name: fresh[name] for name in made.updates.saved}, params.rank, params.seed)

    record = train(plan, made, held, start, partial, progress)
    mended = take_what_helped(made, record, start, partial, progress)
    after = record.best if record.best_step == record.step else score(made.student, made.teacher, held)
    gained = won(record, after, made.goal, progress)
    made.updates.finish()
    written = save_model(saved, output, like=inputs["model"], progress=progress)
    (output / "curve.json").write_text(json.dumps(record.curve) + "\n", encoding="utf-8")
    return {
        **proven(params.update, inputs["model"], output, written, mended),
        **gained,
        "steps": float(record.step),
        "best_step": float(record.best_step),
        "tokens": float(record.step * params.batch_windows * made.window_tokens),
    }


def admit(params: RecoverParams, known: Mapping[str, Any]) -> Subject:
    """The model as it came, if it can learn in the way asked."""
    from stages.models.text.windows import check_split
    from stages.recover.checks import check_known

    check_known(known["model"], known["teacher"], params)
    for role, split in (("text", "train"), ("text", "validate"), ("other", "validate")):
        check_split(known, split, role)
    model: Subject = known["model"]
    return model


RECOVER = Stage(
    name="recover",
    params=RecoverParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "teacher": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "text": Input(kinds=frozenset({Kind.CORPUS})),
        "other": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
    },
    output=Kind.CHECKPOINT,
    image=Image.TORCH,
    run=recover,
    admit=admit,
)
