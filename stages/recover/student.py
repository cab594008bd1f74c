"""A student that learns from a teacher: its optimizer, its state on disk, its held-out score.

Shapes: N windows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.algorithms.distillation import Targets, distill
from stages.algorithms.products import SHORT
from stages.models.anatomy import blocks as anatomy
from stages.models.memory.saved_state import names, read_record, restore, save_state
from stages.recover.checks import check_goal
from stages.recover.headless import Apart
from stages.recover.held_out import Score
from stages.recover.matched_blocks import inputs_of
from stages.recover.teacher_answers import Lessons
from stages.recover.weight_updates import Updates, listen

LARGEST_GRADIENT = 1.0
"""Gradients are scaled down to this norm."""
ACTIVATIONS = 30
"""A block keeps about this many floats for its backward pass, a token and hidden unit."""
MOST_ACTIVATIONS = 4 * 2**30
"""Blocks that would keep more bytes than this are computed again in the backward pass: a third more time."""


@dataclass(frozen=True)
class Goal:
    """The loss: shares of divergence and cross-entropy, and how much the inputs of listened-to blocks count."""

    kl_weight: float
    temperature: float
    hidden_weight: float

    def of(self, score: Score) -> float:
        """What a held-out score is worth by this goal, nats a token; what the teacher itself has is 0."""
        return self.kl_weight * score.kl + (1 - self.kl_weight) * score.excess

    def of_each(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """The same of each held-out text."""
        return {name: self.of(one) for name, one in scores.items()}

    @property
    def judged(self) -> str:
        """What `of` is called in words."""
        return "held-out KL" if self.kl_weight == 1 else "held-out score"


@dataclass(frozen=True)
class Learner:
    """Student, lessons, optimizer.

    Attributes:
        ids_NT: windows to learn from, as the student reads them.
        labels_NT: the next token of each position, -1 where it counts for nothing.
        at_once: windows of one forward pass; a step of more accumulates gradients.
        listened: the student's blocks whose inputs count, in the lessons' order.
    """

    student: Apart
    teacher: Apart
    ids_NT: Tensor
    labels_NT: Tensor
    lessons: Lessons
    updates: Updates
    optimizer: torch.optim.AdamW
    goal: Goal
    at_once: int
    listened: Mapping[str, nn.Module]

    @property
    def window_tokens(self) -> int:
        """Tokens of the text in one window: of an encoder-decoder, what the encoder reads."""
        return self.student.source or self.ids_NT.shape[1]


@dataclass
class Record:
    """Where a run stands; saved beside the tensors.

    Attributes:
        before: held-out text -> its score before the first step.
        best: the same at the best step.
        lowest: held-out text -> the lowest score by the goal (`Goal.of`) that it alone had in any check.
        curve: metric -> [step, value] pairs, so that a resumed run draws the whole of it.
    """

    step: int = 0
    before: dict[str, Score] = field(default_factory=dict)
    best: dict[str, Score] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    rate_factor: float = 1.0
    losses: list[float] = field(default_factory=list)
    checks_since_best: int = 0
    curve: dict[str, list[list[float]]] = field(default_factory=dict)

    def point(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self.curve.setdefault(name, []).append([step, value])


def learner(
    student: Apart,
    lessons: Lessons,
    updates: Updates,
    *,
    goal: Goal,
    at_once: int,
    listened: Mapping[str, nn.Module],
    written: int = 0,
) -> Learner:
    """Give what is moved an optimizer, and compute blocks again where their activations would not fit.

    Args:
        student: what learns.
        lessons: the windows to learn from, and the teacher's answers on them.
        updates: how the student's weights learn.
        goal: the loss.
        at_once: windows of one forward pass.
        listened: the student's blocks whose inputs count.
        written: how many windows at the end the teacher wrote itself; their tokens are no truth to predict.

    Raises:
        StageError: a model that predicts no next token is to.
    """
    blocks, ids_NT = anatomy.blocks(student.model), lessons.ids_NT
    check_goal(student.model, student.task, goal.kl_weight)
    listen(updates)
    hidden = student.model.config.get_text_config().hidden_size
    if at_once * ids_NT.shape[1] * hidden * len(blocks) * ACTIVATIONS * SHORT.itemsize > MOST_ACTIVATIONS:
        for block in blocks:
            block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False)
    moved = list(updates.moved.values())
    optimizer = torch.optim.AdamW(moved, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    labels_NT = student.labels(ids_NT)
    labels_NT[len(ids_NT) - written :] = -1
    return Learner(student, lessons.teacher, ids_NT, labels_NT, lessons, updates, optimizer, goal, at_once, listened)


def learn(made: Learner, chosen: Sequence[int], rate: float) -> float:
    """One step of the optimizer on some windows; returns the loss. A loss that is not finite changes nothing."""
    total = 0.0
    for first in range(0, len(chosen), made.at_once):
        part = list(chosen[first : first + made.at_once])
        loss = _loss(made, part) * (len(part) / len(chosen))
        total += float(loss.detach())
        if not torch.isfinite(loss):
            break
        loss.backward()
    else:
        _step(made, rate)
    made.optimizer.zero_grad(set_to_none=True)
    return total


def _loss(made: Learner, chosen: list[int]) -> Tensor:
    lesson, ids_NT = made.lessons.of(chosen), made.ids_NT[chosen]
    counted_NT = made.student.counted(ids_NT)
    with inputs_of(made.listened) as heard:
        student_MH = made.student.hidden(ids_NT)[counted_NT]
    counted_M = counted_NT.flatten()
    loss = distill(
        made.student.head,
        student_MH,
        Targets(lesson.targets.tokens_Nk[counted_M], lesson.targets.log_p_Nk[counted_M]),
        made.labels_NT[chosen][counted_NT],
        kl_weight=made.goal.kl_weight,
        temperature=made.goal.temperature,
    )
    tokens_NT = made.student.counted_tokens(ids_NT)
    for name, target_NTH in zip(made.listened, lesson.states, strict=True):
        target_MH = target_NTH[tokens_NT].float()
        gap_M = (heard[name][tokens_NT].float() - target_MH).square().mean(-1)
        # A few tokens carry states a thousand times as large as the others', in one model or in both: each counts
        # relative to its own, and one that only the student makes huge by the logarithm of how much.
        loss = loss + made.goal.hidden_weight * torch.log1p(gap_M / target_MH.square().mean(-1)).mean()
    return loss


def _step(made: Learner, rate: float) -> None:
    nn.utils.clip_grad_norm_(list(made.updates.moved.values()), LARGEST_GRADIENT)
    for group in made.optimizer.param_groups:
        group["lr"] = rate
    made.optimizer.step()
    made.updates.put()


def save(made: Learner, folder: Path, record: Record) -> None:
    """Write state to go on from; the best weights are kept in a file of their own.

    Raises:
        StageError: a weight stands where a sparse update has to leave a zero.
    """
    moved = made.updates.moved
    made.updates.check(list(made.updates.masks))
    state = {f"weight.{name}": tensor for name, tensor in moved.items()}
    for name, tensor in moved.items():
        # What a window does not pass through (a pooler, the maps of a global attention) has no gradient, so no moments.
        if moments := made.optimizer.state.get(tensor):
            state[f"mean.{name}"], state[f"square.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
            state[f"steps.{name}"] = moments["step"]
    if record.best_step == record.step:
        save_state(_best(folder, record.step), moved, {})
    save_state(folder / "state.safetensors", state, vars(record))
    for stale in folder.glob("best-*.safetensors"):
        if stale != _best(folder, record.best_step):
            stale.unlink()


def resume(made: Learner, folder: Path) -> Record | None:
    """Put the last saved state into the learner; None when none was saved."""
    path, moved = folder / "state.safetensors", made.updates.moved
    read = read_record(path)
    if read is None:
        return None
    record = Record(**read)
    for scores in (record.before, record.best):
        scores.update({name: Score(*values) for name, values in scores.items()})
    moments: dict[str, Tensor] = {}
    kept = names(path)
    made.optimizer.state.clear()
    for name, tensor in moved.items():
        if f"mean.{name}" in kept:
            mean, square, steps = torch.empty_like(tensor), torch.empty_like(tensor), torch.tensor(0.0)
            made.optimizer.state[tensor] = {"step": steps, "exp_avg": mean, "exp_avg_sq": square}
            moments |= {f"mean.{name}": mean, f"square.{name}": square, f"steps.{name}": steps}
    restore(path, {f"weight.{name}": tensor for name, tensor in moved.items()} | moments)
    made.updates.put()
    return record


def take(made: Learner, tensors: Mapping[str, Any]) -> None:
    """Give the student these tensors and a fresh optimizer."""
    with torch.no_grad():
        for name, tensor in made.updates.moved.items():
            tensor.copy_(tensors[name])
    made.optimizer.state.clear()
    made.updates.put()


def take_best(made: Learner, folder: Path, record: Record) -> None:
    """Put the tensors of the best held-out score into the student."""
    if record.best_step != record.step:
        restore(_best(folder, record.best_step), made.updates.moved)
        made.updates.put()


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step}.safetensors"
