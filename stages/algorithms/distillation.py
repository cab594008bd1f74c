"""Loss of a student against a teacher's likeliest tokens, from hidden states: no [N, V] tensor outlives a chunk.

Shapes: N positions, H hidden of the student, K hidden of the teacher, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 256
"""Positions at once: one bfloat16 tensor of 256 x 49,152 takes 25 MB."""
_TINY = 1e-30


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits. It takes no gradient; products are computed in its type.

    Attributes:
        weight_VH: its matrix.
        bias_V: added to the product.
        cap: the soft limit c of logits, c tanh(x / c); None without one.
        spread: where V is 1 and the answer no distribution but a number: how much it differs from text to text. It then
            counts as the mean of a normal distribution as wide as that.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    cap: float | None = None
    spread: float | None = None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """logits_NV, in the head's type."""
        logits_NV = hidden_NH.to(self.weight_VH.dtype) @ self.weight_VH.t()
        if self.bias_V is not None:
            logits_NV.add_(self.bias_V)
        return logits_NV if self.cap is None else logits_NV.div_(self.cap).tanh_().mul_(self.cap)


@dataclass(frozen=True)
class Targets:
    """What a teacher says at each position: its k likeliest tokens. The others share what these leave of one.

    Attributes:
        tokens_Nk: int32.
        log_p_Nk: float32, natural logarithms; the number itself where the answer is one.
    """

    tokens_Nk: Tensor
    log_p_Nk: Tensor


def likeliest(head: Head, hidden_NH: Tensor, k: int, temperature: float = 1.0) -> Targets:
    """The k likeliest tokens at each position, at a temperature; the number itself where the answer is one."""
    if head.spread:
        numbers_N1 = head.logits(hidden_NH).float()
        return Targets(torch.zeros_like(numbers_N1, dtype=torch.int32), numbers_N1)
    tokens, values = [], []
    for h_NH in hidden_NH.split(CHUNK):
        logits_NV = head.logits(h_NH).float() / temperature
        top = logits_NV.topk(k, dim=1)
        tokens.append(top.indices.int())
        values.append(top.values - logits_NV.logsumexp(1, keepdim=True))
    return Targets(torch.cat(tokens), torch.cat(values))


def compared(
    student: Head, teacher: Head, student_NH: Tensor, teacher_NK: Tensor, labels_N: Tensor
) -> tuple[Tensor, Tensor]:
    """How far a student's next-token distributions, over the whole vocabulary, are from a teacher's at each position.

    Args:
        student: the student's output map.
        teacher: the teacher's.
        student_NH: the student's last hidden states.
        teacher_NK: the teacher's.
        labels_N: the next token of each position, -1 where there is none.

    Returns:
        kl_N, KL(teacher || student), and excess_N, the student's cross-entropy less the teacher's, 0 without a label;
        nats, float32.
    """
    if teacher.spread:
        gap_N1 = student.logits(student_NH).float() - teacher.logits(teacher_NK).float()
        return _of_numbers(gap_N1, teacher.spread), torch.zeros(len(gap_N1))
    divergences, excesses = [], []
    parts = zip(student_NH.split(CHUNK), teacher_NK.split(CHUNK), labels_N.split(CHUNK), strict=True)
    for h_NH, t_NK, l_N in parts:
        log_q_NV = student.logits(h_NH).float().log_softmax(1)
        log_p_NV = teacher.logits(t_NK).float().log_softmax(1)
        gap_NV = log_p_NV - log_q_NV
        divergences.append((log_p_NV.exp() * gap_NV).sum(1))
        excesses.append(gap_NV.gather(1, l_N.clamp_min(0)[:, None])[:, 0] * (l_N >= 0))
    return torch.cat(divergences), torch.cat(excesses)


def distill(
    head: Head,
    student_NH: Tensor,
    targets: Targets,
    labels_N: Tensor,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Mean over positions of kl_weight * T² * KL(teacher || student) at T + (1 - kl_weight) * cross-entropy.

    The divergence is that of k + 1 outcomes, the k tokens and all others together: a lower bound of the whole one,
    equal to it at k = V. The others keep the student's own proportions.

    Args:
        head: the student's output map.
        student_NH: the student's last hidden states; the gradient goes here.
        targets: the teacher's at the same positions, at the same temperature.
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
    if head.spread:
        return _of_numbers(head.logits(student_NH).float() - targets.log_p_Nk, head.spread).mean()
    loss: Tensor = _Distill.apply(student_NH, head, targets, labels_N, kl_weight, temperature)
    return loss


def _of_numbers(gap_N1: Tensor, spread: float) -> Tensor:
    """KL between two normal distributions of this spread whose means are so far apart, [N]."""
    return (gap_N1[:, 0] / spread).square() / 2


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        student_NH, head, targets, labels_N, kl_weight, temperature = args
        grad_NH = torch.empty_like(student_NH)
        count, total = len(student_NH), torch.zeros(())
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            logits_NV = head.logits(student_NH[part])
            grad_NV = None
            if kl_weight > 0:
                chunk = Targets(targets.tokens_Nk[part].long(), targets.log_p_Nk[part])
                loss, grad_NV = _divergence(logits_NV, chunk, temperature)
                total += kl_weight * temperature**2 * loss
                grad_NV *= kl_weight * temperature
            if kl_weight < 1:
                loss, slope_NV = _cross_entropy(logits_NV, labels_N[part])
                total += (1 - kl_weight) * loss
                slope_NV *= 1 - kl_weight
                grad_NV = slope_NV if grad_NV is None else grad_NV.add_(slope_NV)
            assert grad_NV is not None
            grad_NH[part] = (
                grad_NV if head.cap is None else grad_NV * (1 - (logits_NV / head.cap).square())
            ) @ head.weight_VH
        ctx.save_for_backward(grad_NH / count)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grads[0], None, None, None, None, None


def _divergence(logits_NV: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum over positions of the divergence, and its gradient at the logits over the temperature."""
    q_NV = (logits_NV if temperature == 1 else logits_NV / temperature).softmax(1)
    q_Nk = q_NV.gather(1, targets.tokens_Nk).float()
    # The rest is summed over its own tokens: one minus the top would leave only what bfloat16 rounded away.
    rest_q_N1 = q_NV.scatter_(1, targets.tokens_Nk, 0.0).sum(1, keepdim=True, dtype=torch.float32).clamp_min(_TINY)
    p_Nk = targets.log_p_Nk.exp()
    rest_p_N1 = (1 - p_Nk.sum(1, keepdim=True)).clamp_min(0)
    top = (p_Nk * (targets.log_p_Nk - q_Nk.clamp_min(_TINY).log())).sum()
    rest = (torch.xlogy(rest_p_N1, rest_p_N1) - rest_p_N1 * rest_q_N1.log()).sum()
    q_NV *= (1 - rest_p_N1 / rest_q_N1).to(q_NV.dtype)
    q_NV.scatter_(1, targets.tokens_Nk, (q_Nk - p_Nk).to(q_NV.dtype))
    return top + rest, q_NV


def _cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the labelled positions of the cross-entropy, and its gradient at the logits."""
    known_N1 = (labels_N >= 0)[:, None]
    taken_N1 = labels_N.clamp_min(0)[:, None]
    q_NV = logits_NV.softmax(1)
    summed = -(q_NV.gather(1, taken_N1).float().clamp_min(_TINY).log() * known_N1).sum()
    q_NV.scatter_add_(1, taken_N1, -torch.ones_like(taken_N1, dtype=q_NV.dtype))
    return summed, q_NV.mul_(known_N1)
