"""How good a model is beside the dense one: perplexity on each text, KL on the first windows.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stages.measures.divergence import kl_divergence
from stages.measures.perplexity import negative_log_likelihood

Logits = Callable[[Tensor], Tensor]
"""ids_NT -> logits_NTV."""
SHORT = 12
"""Tokens of a short prompt: what a range or a cut does to the first tokens, a long window hides."""


@torch.no_grad()
def score(
    model: Logits,
    dense: Logits,
    texts: Mapping[str, Tensor],
    kl_windows: int,
    advanced: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, float]:
    """Perplexity of every text, and the mean KL(dense || model) over the first windows of the first text.

    Args:
        model: what is judged.
        dense: what it was made from.
        texts: name -> ids_NT.
        kl_windows: so many windows are read by both models; the others by one.
        advanced: hears how many windows are done.

    Returns:
        `perplexity_<text>`, and `kl` and `kl_short` in nats a token: the latter on each of the first text's windows cut
        to its first SHORT tokens; NaN where no window is read by both.
    """
    figures, divergences = dict[str, float](), list[Tensor]()
    done, total = 0, sum(len(ids_NT) for ids_NT in texts.values())
    for number, (name, ids_NT) in enumerate(texts.items()):
        parts = []
        for index, ids_T in enumerate(ids_NT):
            logits_TV = model(ids_T[None])[0, :-1].float()
            parts.append(negative_log_likelihood(logits_TV, ids_T[1:]))
            if number == 0 and index < kl_windows:
                divergences.append(kl_divergence(dense(ids_T[None])[0, :-1].float(), logits_TV))
            done += 1
            advanced(done, total)
        figures[f"perplexity_{name}"] = math.exp(min(700.0, float(torch.cat(parts).mean())))
    figures["kl"] = float(torch.cat(divergences).mean()) if divergences else math.nan
    figures["kl_short"] = _short(model, dense, next(iter(texts.values()))) if divergences else math.nan
    return figures


def _short(model: Logits, dense: Logits, ids_NT: Tensor) -> float:
    found = []
    for ids_T in ids_NT[:, :SHORT]:
        both = (one(ids_T[None])[0].float() for one in (dense, model))
        found.append(kl_divergence(*both))
    return float(torch.cat(found).mean())
