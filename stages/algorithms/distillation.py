"""Loss of a student against a teacher, from hidden states: no [N, V] tensor outlives a chunk of positions.

Shapes: N positions, H hidden of the student, K hidden of the teacher, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""Positions at once: five float tensors of 128 x 49,152 take 126 MB, a whole batch of 1,024 would take 1 GB."""


@dataclass(frozen=True)
class Heads:
    """The two maps from hidden states to logits. They take no gradient; products are computed in their type."""

    student_VH: Tensor
    teacher_VK: Tensor


def divergence(heads: Heads, student_NH: Tensor, teacher_NK: Tensor) -> Tensor:
    """KL(teacher || student) of the next-token distributions, nats, one value a position.

    Returns:
        kl_N, float32.
    """
    values = []
    for h_NH, t_NK in zip(student_NH.split(CHUNK), teacher_NK.split(CHUNK), strict=True):
        log_q_NV = _logits(h_NH, heads.student_VH).log_softmax(1)
        log_p_NV = _logits(t_NK, heads.teacher_VK).log_softmax(1)
        values.append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1))
    return torch.cat(values)


def distill(
    heads: Heads,
    student_NH: Tensor,
    teacher_NK: Tensor,
    labels_N: Tensor,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over positions of kl_weight * T² * KL(teacher || student) at T + (1 - kl_weight) * cross-entropy.

    Args:
        heads: student's and teacher's output maps.
        student_NH: the student's last hidden states; the gradient goes here.
        teacher_NK: the teacher's last hidden states.
        labels_N: the next token of each position, -1 where there is none; such positions have no cross-entropy.
        kl_weight: 1 for pure distillation.
        temperature: softens both distributions.

    Returns:
        The loss, a scalar that can be differentiated once.

    Raises:
        ValueError: kl_weight is outside 0..1 or the temperature is not positive.

    Source: Hinton, Vinyals, Dean 2015, section 2.
    """
    if not 0 <= kl_weight <= 1 or temperature <= 0:
        raise ValueError(f"kl_weight {kl_weight} must lie in 0..1 and temperature {temperature} above 0")
    loss: Tensor = _Distill.apply(student_NH, teacher_NK, labels_N, heads, kl_weight, temperature)
    return loss


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        student_NH, teacher_NK, labels_N, heads, kl_weight, temperature = args
        grad_NH = torch.empty_like(student_NH)
        count = len(student_NH)
        total = torch.zeros(())
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            logits_NV = _logits(student_NH[part], heads.student_VH)
            grad_NV = torch.zeros_like(logits_NV)
            if kl_weight > 0:
                target_NV = _logits(teacher_NK[part], heads.teacher_VK)
                total += kl_weight * _divergence(logits_NV, target_NV, temperature, kl_weight, grad_NV)
            if kl_weight < 1:
                total += (1 - kl_weight) * _cross_entropy(logits_NV, labels_N[part], 1 - kl_weight, grad_NV)
            grad_NH[part] = grad_NV.to(heads.student_VH.dtype) @ heads.student_VH
        ctx.save_for_backward(grad_NH / count)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grads[0], None, None, None, None, None


def _logits(hidden_NH: Tensor, head_VH: Tensor) -> Tensor:
    return (hidden_NH.to(head_VH.dtype) @ head_VH.t()).float()


def _divergence(logits_NV: Tensor, target_NV: Tensor, temperature: float, weight: float, grad_NV: Tensor) -> Tensor:
    log_q_NV = (logits_NV / temperature).log_softmax(1)
    log_p_NV = target_NV.div_(temperature).log_softmax(1)
    p_NV = log_p_NV.exp()
    summed = (p_NV * (log_p_NV - log_q_NV)).sum() * temperature**2
    grad_NV += (log_q_NV.exp_() - p_NV) * (weight * temperature)
    return summed


def _cross_entropy(logits_NV: Tensor, labels_N: Tensor, weight: float, grad_NV: Tensor) -> Tensor:
    known_N1 = (labels_N >= 0)[:, None]
    log_q_NV = logits_NV.log_softmax(1)
    taken_N1 = labels_N.clamp_min(0)[:, None]
    summed = -(log_q_NV.gather(1, taken_N1) * known_N1).sum()
    slope_NV = log_q_NV.exp_().scatter_add_(1, taken_N1, -torch.ones_like(known_N1, dtype=log_q_NV.dtype))
    grad_NV += slope_NV * (known_N1 * weight)
    return summed
