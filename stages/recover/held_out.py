"""Texts that are never trained on: how far the student is from its teacher on each, and which of them fares worst.

Shapes: N windows, T tokens, H hidden, M tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from stages.algorithms.distillation import compared
from stages.models.text.windows import Windows
from stages.recover.headless import Apart

NOTHING_LOST = 0.01
"""Nats a token. A text that has lost no more counts as if it had lost this: twice of next to nothing is nothing."""


@dataclass(frozen=True)
class HeldOut:
    """Windows that are never trained on, with the teacher's last hidden states."""

    name: str
    ids_NT: Tensor
    teacher_NTH: Tensor


class Score(NamedTuple):
    """Of a held-out text: mean KL to the teacher and cross-entropy less the teacher's, nats a token."""

    kl: float
    excess: float


def by_source(role: str, found: Windows) -> dict[str, Tensor]:
    """An input's windows as texts to judge by: one for each of its sources, or one where it has no several."""
    names = dict.fromkeys(found.names)
    if len(names) < 2:
        return {role: found.ids_NT}
    rows = {name: [n for n, one in enumerate(found.names) if one == name] for name in names}
    return {f"{role}_{name}": found.ids_NT[places] for name, places in rows.items()}


@torch.no_grad()
def held_out(teacher: Apart, name: str, ids_NT: Tensor) -> HeldOut:
    """Run the teacher once over the windows; its hidden states are a hundredth of its logits."""
    return HeldOut(name, ids_NT, torch.cat([teacher.hidden(ids_1T) for ids_1T in ids_NT.split(1)]))


@torch.no_grad()
def score(student: Apart, teacher: Apart, held: Sequence[HeldOut]) -> dict[str, Score]:
    """How near the student is to the teacher on each held-out text."""
    scores: dict[str, Score] = {}
    for text in held:
        total, count = torch.zeros(2), 0
        labels_NT, counted_NT = student.labels(text.ids_NT), student.counted(text.ids_NT)
        for n, ids_1T in enumerate(text.ids_NT.split(1)):
            at = counted_NT[n]
            student_MH, teacher_MH = student.hidden(ids_1T)[0][at], text.teacher_NTH[n][at]
            sides = compared(student.head, teacher.head, student_MH, teacher_MH, labels_NT[n][at])
            total, count = total + torch.stack([side_M.sum() for side_M in sides]), count + len(student_MH)
        kl, excess = (total / count).tolist()
        scores[text.name] = Score(kl, excess)
    return scores


def mean_kl(scores: Mapping[str, Score]) -> float:
    """Over the held-out texts, each counted once."""
    return fmean(one.kl for one in scores.values())


def left(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Text -> how much of what it had lost before the first step it still has lost: 1 where nothing was won.

    A text that is hard by nature is measured by its own beginning, and does not decide for all.

    Args:
        now: text -> its score; what the teacher has is 0, and below that is better.
        before: the same before the first step.
    """
    return {name: now[name] / max(lost, NOTHING_LOST) for name, lost in before.items()}


def worst(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """What is left of the loss where most of it is; infinite where a score is no number."""
    # Which one `max` gives where there is a NaN depends on their order.
    return max(math.inf if math.isnan(part) else part for part in left(now, before).values())
