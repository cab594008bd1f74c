"""recover: what surgery cost is learned back from the original, and what a held-out text did not gain is not kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from stages.runtime.contract import PARTIAL, Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.models.training import HeldOut, Learner, Record


class RecoverParams(Params):
    """How long and how fast the student learns.

    Attributes:
        tokens: length of the training, in tokens read.
        window_tokens: tokens of one window.
        batch_windows: windows a step.
        learning_rate: at its peak.
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
    learning_rate: float = Field(default=3e-4, gt=0)
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


LARGEST_JUMP = 4.0
"""A loss this many times the median of the last ones is a jump: batches of one text differ by less than 2."""
REMEMBERED = 16


def recover(params: RecoverParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """See RecoverParams. Partial state is saved at every check; a resumed run ends in the same bytes."""
    from stages.models import training
    from stages.models.loading import load_model, load_tokenizer, save_model
    from stages.models.windows import windows

    _check_same_tokens(inputs["model"], inputs["teacher"])
    student, teacher = load_model(inputs["model"]), load_model(inputs["teacher"])
    _check_float(student)
    tokenizer = load_tokenizer(inputs["model"])
    made = training.learner(student, teacher, kl_weight=params.kl_weight, temperature=params.temperature)
    ids_NT = windows(inputs["text"], "train", tokenizer, params.window_tokens)
    held = [
        training.held_out(
            teacher,
            role,
            windows(inputs[role], "validate", tokenizer, params.window_tokens, most=params.check_windows),
        )
        for role in ("text", "other")
        if role in inputs
    ]
    record = _train(params, made, ids_NT, held, inputs["model"], output / PARTIAL, progress)
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
    return {
        **_proven(inputs["model"], output),
        **{f"kl_{role}_after": value for role, value in after.items()},
        "kl_before": record.kl_before,
        "kl_after": record.best_kl,
        "steps": float(record.step),
        "best_step": float(record.best_step),
        "tokens": float(record.step * params.batch_windows * params.window_tokens),
    }


def _train(
    params: RecoverParams,
    made: Learner,
    ids_NT: Tensor,
    held: list[HeldOut],
    start: Path,
    partial: Path,
    progress: Progress,
) -> Record:
    from stages.algorithms.schedule import batch, cosine
    from stages.models import training

    record = training.resume(made, partial) or _fresh(made, held, progress)
    while record.step < params.steps and record.checks_since_best < params.patience:
        share = cosine(record.step, params.steps, params.warmup_steps)
        chosen = batch(record.step, params.batch_windows, len(ids_NT), params.seed)
        loss = training.learn(made, ids_NT[chosen], params.learning_rate * record.rate_factor * share)
        if _jumped(loss, record.losses):
            record = _rolled_back(made, held, start, partial, progress, record, loss)
            continue
        record.step += 1
        record.losses = [*record.losses, loss][-REMEMBERED:]
        progress.metric("kl", loss, record.step)
        progress.advanced(record.step, params.steps)
        if record.step % params.check_every_steps == 0 or record.step == params.steps:
            _check(made, held, record, progress)
            training.save(made, partial, record)
    return record


def _fresh(made: Learner, held: list[HeldOut], progress: Progress) -> Record:
    from stages.models.training import Record, score

    means = score(made, held)
    kl = sum(means.values()) / len(means)
    _tell(means, 0, progress)
    return Record(kl_before=kl, best_kl=kl)


def _check(made: Learner, held: list[HeldOut], record: Record, progress: Progress) -> None:
    from stages.models.training import score

    means = score(made, held)
    kl = sum(means.values()) / len(means)
    _tell(means, record.step, progress)
    record.checks_since_best += 1
    if kl < record.best_kl:
        record.best_kl, record.best_step, record.checks_since_best = kl, record.step, 0


def _tell(means: Mapping[str, float], step: int, progress: Progress) -> None:
    for role, kl in means.items():
        progress.metric(f"kl_{role}_held_out", kl, step)


def _jumped(loss: float, losses: list[float]) -> bool:
    median = sorted(losses)[len(losses) // 2] if losses else 0.0
    # A comparison with NaN is false, so that this order catches it too.
    return not loss < float("inf") or (len(losses) >= REMEMBERED // 2 and loss > LARGEST_JUMP * median)


def _rolled_back(
    made: Learner,
    held: list[HeldOut],
    start: Path,
    partial: Path,
    progress: Progress,
    record: Record,
    loss: float,
) -> Record:
    from stages.models import training
    from stages.models.loading import load_model

    what = f"the loss left its course at step {record.step + 1}"
    if record.rate_factor < 1:
        raise StageError(
            f"{what}, again after the rate was halved",
            measured=f"loss {loss:.4g}, {record.losses[-1] if record.losses else record.kl_before:.4g} before",
            limit=f"{LARGEST_JUMP} times the median of the last {REMEMBERED} losses",
            remedy="Lower `learning_rate`, or look at the text for passages unlike the rest.",
        )
    back = training.resume(made, partial)
    if back is None:
        training.take(made, dict(load_model(start).named_parameters()))
        back = training.Record(kl_before=record.kl_before, best_kl=record.kl_before)
    back.rate_factor = 0.5
    progress.note(f"{what} ({loss:.4g}): back to step {back.step} at half the learning rate")
    return back


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
