"""How far a model's predictions are from those of its baseline, token by token.

Shapes: T predicted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.measures.perplexity import ROWS


def kl_divergence(baseline_TV: Tensor, model_TV: Tensor) -> Tensor:
    """KL(baseline || model) of the two predicted distributions, in nats.

    Args:
        baseline_TV: the baseline's logits.
        model_TV: the model's logits.

    Returns:
        kl_T (float64), at least 0; NaN or infinite where the logits demand it.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_TV, model_TV)
    parts = [torch.empty(0, dtype=torch.float64)]
    for p_RV, q_RV in zip(baseline_TV.split(ROWS), model_TV.split(ROWS), strict=True):
        log_p, log_q = p_RV.double().log_softmax(-1), q_RV.double().log_softmax(-1)
        p = log_p.exp()
        # 0 * log(0 / q) is 0 by continuity; the product alone would be NaN. NaN > 0 is false, so ask for p == 0.
        terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
        parts.append(terms.sum(-1).clamp_min(0))
    return torch.cat(parts)


def top1_agreement(baseline_TV: Tensor, model_TV: Tensor) -> Tensor:
    """Whether both find the same token likeliest: bool, shape [T].

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(baseline_TV, model_TV)
    return baseline_TV.argmax(-1) == model_TV.argmax(-1)


def _same_shape(baseline_TV: Tensor, model_TV: Tensor) -> None:
    if baseline_TV.shape != model_TV.shape or baseline_TV.ndim != 2:
        raise ValueError(f"logits {tuple(baseline_TV.shape)} and {tuple(model_TV.shape)} cannot be compared")
