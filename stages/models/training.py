"""A student that learns from a teacher: its optimizer, its state on disk, its held-out score.

Shapes: N windows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.distillation import Heads, distill, divergence
from stages.models import anatomy
from stages.models.resuming import read_record, restore, save_state

LARGEST_GRADIENT = 1.0
"""Gradients are scaled down to this norm."""


@dataclass(frozen=True)
class HeldOut:
    """Windows that are never trained on, with the teacher's last hidden states."""

    name: str
    ids_NT: Tensor
    teacher_NTH: Tensor


@dataclass(frozen=True)
class Learner:
    """Student, teacher and optimizer. The embedding and the head stay as they are; blocks and norms learn.

    The tied table is a fifth of a small model: leaving it alone saves its gradient and two moments.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    heads: Heads
    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    kl_weight: float
    temperature: float


@dataclass
class Record:
    """Where a run stands; saved beside the tensors.

    Attributes:
        curve: metric -> [step, value] pairs, so that a resumed run draws the whole of it.
    """

    step: int = 0
    kl_before: float = 0.0
    best_kl: float = 0.0
    best_step: int = 0
    rate_factor: float = 1.0
    losses: list[float] = field(default_factory=list)
    checks_since_best: int = 0
    curve: dict[str, list[list[float]]] = field(default_factory=dict)

    def point(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self.curve.setdefault(name, []).append([step, value])


def learner(student: PreTrainedModel, teacher: PreTrainedModel, *, kl_weight: float, temperature: float) -> Learner:
    """Freeze what stays, and give the rest an optimizer."""
    frozen = {id(anatomy.embedding(student).weight), id(anatomy.head(student).weight)}
    weights = {name: tensor for name, tensor in student.named_parameters() if id(tensor) not in frozen}
    for tensor in student.parameters():
        tensor.requires_grad_(id(tensor) not in frozen)
    heads = Heads(_table(student), _table(teacher))
    optimizer = torch.optim.AdamW(list(weights.values()), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return Learner(student, teacher, heads, weights, optimizer, kl_weight, temperature)


def held_out(teacher: PreTrainedModel, name: str, ids_NT: Tensor) -> HeldOut:
    """Run the teacher once over the windows; its hidden states are a hundredth of its logits."""
    return HeldOut(name, ids_NT, torch.cat([_hidden(teacher, ids_1T) for ids_1T in ids_NT.split(1)]))


@torch.no_grad()
def score(made: Learner, held: Sequence[HeldOut]) -> dict[str, float]:
    """Mean KL to the teacher on each held-out text, nats a token."""
    means: dict[str, float] = {}
    for one in held:
        total = 0.0
        for ids_1T, teacher_TH in zip(one.ids_NT.split(1), one.teacher_NTH, strict=True):
            total += float(divergence(made.heads, _hidden(made.student, ids_1T)[0], teacher_TH).sum())
        means[one.name] = total / one.ids_NT.numel()
    return means


def learn(made: Learner, ids_NT: Tensor, rate: float) -> float:
    """One step of the optimizer on some windows; returns the loss. A loss that is not finite changes nothing."""
    teacher_H = _hidden(made.teacher, ids_NT).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        student_H = anatomy.decoder(made.student)(input_ids=ids_NT, use_cache=False).last_hidden_state.flatten(0, 1)
    labels_NT = torch.cat([ids_NT[:, 1:], torch.full_like(ids_NT[:, :1], -1)], dim=1)
    loss = distill(
        made.heads,
        student_H,
        teacher_H,
        labels_NT.flatten(),
        kl_weight=made.kl_weight,
        temperature=made.temperature,
    )
    if torch.isfinite(loss):
        loss.backward()
        nn.utils.clip_grad_norm_(list(made.weights.values()), LARGEST_GRADIENT)
        for group in made.optimizer.param_groups:
            group["lr"] = rate
        made.optimizer.step()
    made.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def save(made: Learner, folder: Path, record: Record) -> None:
    """Write state to go on from; the best weights are kept in a file of their own."""
    state = {f"weight.{name}": tensor for name, tensor in made.weights.items()}
    for name, tensor in made.weights.items():
        moments = made.optimizer.state[tensor]
        state[f"mean.{name}"], state[f"square.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    if record.best_step == record.step:
        save_state(_best(folder, record.step), dict(made.weights), {})
    save_state(folder / "state.safetensors", state, vars(record))
    for stale in folder.glob("best-*.safetensors"):
        if stale != _best(folder, record.best_step):
            stale.unlink()


def resume(made: Learner, folder: Path) -> Record | None:
    """Put the last saved state into the learner; None when none was saved."""
    path = folder / "state.safetensors"
    read = read_record(path)
    if read is None:
        return None
    record = Record(**read)
    moments: dict[str, Tensor] = {}
    for name, tensor in made.weights.items():
        mean, square = torch.empty_like(tensor), torch.empty_like(tensor)
        made.optimizer.state[tensor] = {"step": torch.tensor(float(record.step)), "exp_avg": mean, "exp_avg_sq": square}
        moments |= {f"mean.{name}": mean, f"square.{name}": square}
    restore(path, {f"weight.{name}": tensor for name, tensor in made.weights.items()} | moments)
    return record


def take(made: Learner, tensors: Mapping[str, Any]) -> None:
    """Give the student these weights and a fresh optimizer."""
    with torch.no_grad():
        for name, tensor in made.weights.items():
            tensor.copy_(tensors[name])
    made.optimizer.state.clear()


def take_best(made: Learner, folder: Path, record: Record) -> None:
    """Put the weights with the lowest held-out KL into the student."""
    if record.best_step != record.step:
        restore(_best(folder, record.best_step), made.weights)


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step}.safetensors"


@torch.no_grad()
def _hidden(model: PreTrainedModel, ids_NT: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden: Tensor = anatomy.decoder(model)(input_ids=ids_NT, use_cache=False).last_hidden_state
    return hidden


def _table(model: PreTrainedModel) -> Tensor:
    table: Tensor = anatomy.head(model).weight.detach().bfloat16()  # type: ignore[operator]
    return table
