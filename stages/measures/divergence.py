"""How far a model's predictions are from those of its baseline, row by row.

Shapes: T predicted tokens, R rows, V vocabulary, classes or dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.measures.perplexity import ROWS, shifted

_APART = 1e-5
"""Answers that differ by no more of their length are one: that is how they are rounded."""


def kl_divergence(baseline_TV: Tensor, model_TV: Tensor) -> Tensor:
    """KL(baseline || model) of the two predicted distributions, in nats.

    Args:
        baseline_TV: the baseline's logits.
        model_TV: the model's logits.

    Returns:
        kl_T (float64), at least 0 and within 1e-6; NaN or infinite where the logits demand it.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_TV, model_TV)
    parts = [torch.empty(0, dtype=torch.float64)]
    for p_RV, q_RV in zip(baseline_TV.split(ROWS), model_TV.split(ROWS), strict=True):
        (a_RV, e_RV, lse_a_R), (b_RV, _, lse_b_R) = shifted(p_RV), shifted(q_RV)
        # 0 * log(0 / q) is 0 by continuity; the product alone would be NaN. NaN == 0 is false, so a NaN stays one.
        terms_RV = torch.where(e_RV == 0, 0.0, e_RV * (a_RV - b_RV))
        mean_R = terms_RV.sum(-1, dtype=torch.float64) / e_RV.sum(-1, dtype=torch.float64)
        parts.append((mean_R - lse_a_R + lse_b_R).clamp_min(0))
    return torch.cat(parts)


def kl_of_labels(baseline_RV: Tensor, model_RV: Tensor) -> Tensor:
    """KL(baseline || model) of labels each of which holds or not, whatever the others, in nats: the sum over labels.

    A softmax would not see what is added to all logits, by which labels are found that were not.

    Args:
        baseline_RV: the baseline's logits.
        model_RV: the model's logits.

    Returns:
        kl_R (float64); NaN or infinite where the logits demand it.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_RV, model_RV)
    pairs = (torch.stack([torch.zeros_like(one), one], -1).flatten(0, -2) for one in (baseline_RV, model_RV))
    return kl_divergence(*pairs).view(baseline_RV.shape).sum(-1)


def top1_agreement(baseline_TV: Tensor, model_TV: Tensor) -> Tensor:
    """Whether both find the same token or class likeliest.

    Returns:
        bool, shape [T].

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_TV, model_TV)
    return baseline_TV.argmax(-1) == model_TV.argmax(-1)


def cosine(baseline_RV: Tensor, model_RV: Tensor) -> Tensor:
    """The cosine between what both answer.

    Returns:
        cosine_R (float64), 1 for the same direction.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_RV, model_RV)
    return torch.nn.functional.cosine_similarity(baseline_RV.double(), model_RV.double(), dim=-1)


def relative_error(baseline_RV: Tensor, model_RV: Tensor) -> Tensor:
    """How long the difference of both answers is, over the length of the baseline's.

    Returns:
        error_R (float64), 0 where they are equal.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_RV, model_RV)
    a_RV, b_RV = baseline_RV.double(), model_RV.double()
    return (b_RV - a_RV).norm(dim=-1) / a_RV.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def contrast(baseline_RV: Tensor, model_RV: Tensor) -> Tensor:
    """The cosine between how each answer differs from the one before it, and the first from the last, to both.

    A model to which all texts are one has none, however near its only answer lies to all of the baseline's.

    Returns:
        contrast_R (float64); 1 where the baseline tells nothing apart.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_RV, model_RV)
    a_RV, b_RV = (one.double() - one.double().roll(1, 0) for one in (baseline_RV, model_RV))
    alike_R = a_RV.norm(dim=-1) <= _APART * baseline_RV.double().norm(dim=-1)
    return torch.nn.functional.cosine_similarity(a_RV, b_RV, dim=-1).masked_fill(alike_R, 1.0)


def _same_shape(baseline_TV: Tensor, model_TV: Tensor) -> None:
    if baseline_TV.shape != model_TV.shape or baseline_TV.ndim != 2:
        raise ValueError(f"logits {tuple(baseline_TV.shape)} and {tuple(model_TV.shape)} cannot be compared")
