"""recover: what surgery cost is learned back from the original, and what a held-out text did not gain is not kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RecoverParams(Params):
    """How long and how fast the student learns.

    Attributes:
        tokens: length of the training, in tokens read.
        window_tokens: tokens of one window.
        batch_windows: windows a step.
        learning_rate: at its peak; 3e-4 made a lightly cut 135 M model worse (held-out KL 0.09 to 0.22), 5e-5 better.
        kl_weight: share of the distance to the teacher in the loss; the rest is the next token's cross-entropy.
        temperature: softens teacher and student.
        warmup_steps: steps until the peak rate.
        check_every_steps: how often the held-out texts are scored and the state is saved.
        check_windows: windows of each held-out text.
        patience: checks without a better score until training ends.
        seed: of the order of windows.
    """

    tokens: int = Field(default=100_000, ge=1)
    window_tokens: int = Field(default=512, ge=8)
    batch_windows: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    kl_weight: float = Field(default=1.0, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=8, ge=0)
    check_every_steps: int = Field(default=25, ge=1)
    check_windows: int = Field(default=4, ge=1)
    patience: int = Field(default=3, ge=1)
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return max(1, round(self.tokens / (self.window_tokens * self.batch_windows)))


def recover(params: RecoverParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See RecoverParams. Partial state is saved at every check; a resumed run ends in the same bytes."""
    from stages.models import training
    from stages.models.course import Plan, train
    from stages.models.loading import load_model, load_tokenizer, save_model
    from stages.models.windows import windows

    _check_same_tokens(inputs["model"], inputs["teacher"])
    student, teacher = load_model(inputs["model"]), load_model(inputs["teacher"])
    _check_float(student)
    tokenizer, tokens = load_tokenizer(inputs["model"]), params.window_tokens
    ids_NT = windows(inputs["text"], "train", tokenizer, tokens)
    roles = [role for role in ("text", "other") if role in inputs]
    judged = {role: windows(inputs[role], "validate", tokenizer, tokens, most=params.check_windows) for role in roles}
    held = [training.held_out(teacher, role, judged[role]) for role in roles]
    made = training.learner(student, teacher, kl_weight=params.kl_weight, temperature=params.temperature)
    plan = Plan(**params.model_dump(include={field.name for field in fields(Plan)}), steps=params.steps)
    record = train(
        plan,
        made,
        ids_NT,
        held,
        lambda: dict(load_model(inputs["model"]).named_parameters()),
        output / PARTIAL,
        progress,
    )
    if record.best_step == 0:
        raise StageError(
            "recovery did not help",
            measured=f"held-out KL {record.best_kl:.4f} before, none lower in {record.step} steps",
            limit="a lower held-out KL than before",
            remedy="Lower `learning_rate`, give more `tokens` or text nearer to the held-out one, or drop the step.",
        )
    training.take_best(made, output / PARTIAL, record)
    after = training.score(made, held)
    save_model(student, output, like=inputs["model"])
    (output / "curve.json").write_text(json.dumps(record.curve) + "\n", encoding="utf-8")
    return {
        **_proven(inputs["model"], output),
        **{f"kl_{role}_after": value for role, value in after.items()},
        "kl_before": record.kl_before,
        "kl_after": record.best_kl,
        "steps": float(record.step),
        "best_step": float(record.best_step),
        "tokens": float(record.step * params.batch_windows * params.window_tokens),
    }


def _check_same_tokens(model: Path, teacher: Path) -> None:
    from stages.models.loading import load_config, load_tokenizer

    sizes = [load_config(folder).vocab_size for folder in (model, teacher)]
    if sizes[0] != sizes[1] or load_tokenizer(model).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise StageError(
            "model and teacher do not speak the same tokens",
            measured=f"vocabulary of {sizes[1]} in the teacher",
            limit=f"the model's own, {sizes[0]}",
            remedy="Give as teacher the checkpoint that the model was made from.",
        )


def _check_float(model: PreTrainedModel) -> None:
    from stages.models.quantized import describe

    if describe(model) is not None:
        raise StageError("a quantized checkpoint cannot learn", remedy="Put `recover` before `quantize`.")


def _proven(before: Path, after: Path) -> Metrics:
    """Count the tensors that differ between the two checkpoints as they lie on disk."""
    import torch

    from stages.models.loading import load_model, stored_parameters

    old = dict(load_model(before).named_parameters())
    new = dict(load_model(after).named_parameters())
    changed = sum(not torch.equal(tensor, old[name]) for name, tensor in new.items() if name in old)
    if new.keys() != old.keys() or not changed:
        raise StageError(
            "recovery changed no tensor of the checkpoint, or its structure",
            measured=f"{changed} of {len(old)} tensors differ, {len(new)} written",
            limit="the same tensors with other values",
        )
    return {"changed_tensors": float(changed), "parameters": float(stored_parameters(after))}


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
)
