"""A model apart from its head: last hidden states on one side, the map from these to logits on the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.distillation import Head
from stages.models import anatomy, kv_cache
from stages.models.loading import load_model
from stages.runtime.contract import StageError

WHOLE_ATTENTION = 256
"""Up to this many tokens the plain product of queries and keys takes half the time of torch's fused one in bfloat16."""
LOGIT_TOLERANCE = 0.02
"""Difference, over the largest logit, that two roundings to bfloat16 explain."""


@dataclass(frozen=True)
class Apart:
    """A model in bfloat16 whose head was taken off, and the head. Its dropout is off."""

    model: PreTrainedModel
    head: Head

    def hidden(self, ids_NT: Tensor) -> Tensor:
        """The last hidden states, [N, T, H]."""
        states: Tensor = self.model(input_ids=ids_NT).logits
        return states


def load_apart(folder: Path, tokens: int) -> Apart:
    """Load a checkpoint in bfloat16 and take its head off.

    Args:
        folder: a CHECKPOINT artifact.
        tokens: length of the windows that it will read.

    Raises:
        StageError: the model has two stacks or no head, its logits are not its head's product alone, or its windows
            are shorter.
    """
    model = load_model(folder, dtype=torch.bfloat16)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise StageError(f"{name} has two stacks; recovery teaches models with one", remedy="Drop the step.")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise StageError(f"{name} reads no windows of this length", measured=tokens, limit=most)
    model.config.use_cache = False
    if tokens <= WHOLE_ATTENTION:
        kv_cache.use(model, "eager")
    old = anatomy.head(model)
    assert isinstance(old.weight, Tensor)
    head = Head(old.weight.detach(), None if getattr(old, "bias", None) is None else old.bias.detach())  # type: ignore[operator]
    ids_1T = torch.arange(min(tokens, 8))[None] % model.config.vocab_size
    with torch.no_grad():
        expected_TV = model(input_ids=ids_1T).logits[0].float()
        anatomy.replace(model, old, nn.Identity())
        found_TV = head.logits(model(input_ids=ids_1T).logits[0]).float()
    if not (found_TV - expected_TV).abs().max() <= LOGIT_TOLERANCE * expected_TV.abs().max():
        raise StageError(
            f"the logits of {name} are not its head's product alone; recovery does not understand it",
            measured=f"difference {float((found_TV - expected_TV).abs().max()):.3g}",
            limit=f"{LOGIT_TOLERANCE} of the largest, {float(expected_TV.abs().max()):.3g}",
        )
    return Apart(model, head)


def embedded_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of embedding and head."""
    tables = {
        id(tensor) for module in (anatomy.embedding(model), anatomy.head(model)) for tensor in module.parameters()
    }
    return {name for name, tensor in model.named_parameters() if id(tensor) in tables}
