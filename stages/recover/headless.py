"""A model apart from its head: last hidden states on one side, the map from these to logits on the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.distillation import Head
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model
from stages.models.layers import rounded_cache
from stages.models.text.decoder_answers import NOTHING
from stages.runtime.contract import StageError

WHOLE_ATTENTION = 256
"""Up to this many tokens the plain product of queries and keys takes half the time of torch's fused one in bfloat16."""
LOGIT_TOLERANCE = 0.02
"""Difference, over the largest logit, that two roundings to bfloat16 explain."""


@dataclass(frozen=True)
class Apart:
    """A model in bfloat16 whose head was taken off, and the head. Its dropout is off.

    An encoder-decoder's windows hold S tokens for the encoder, then T for the decoder, NOTHING where an answer ended.

    Attributes:
        model: gives hidden states for logits.
        head: makes logits of them.
        source: S; 0 without an encoder before the decoder.
    """

    model: PreTrainedModel
    head: Head
    source: int = 0

    def hidden(self, ids_NT: Tensor) -> Tensor:
        """The last hidden states, [N, T, H]."""
        if not self.source:
            states: Tensor = self.model(input_ids=ids_NT).logits
            return states
        source_NS, answer_NT = ids_NT[:, : self.source], ids_NT[:, self.source :].clamp_min(0)
        states = self.model(input_ids=source_NS, decoder_input_ids=answer_NT).logits
        return states

    def length(self, ids_NT: Tensor) -> int:
        """T."""
        return ids_NT.shape[1] - self.source

    def counted(self, ids_NT: Tensor) -> Tensor:
        """Whether a position counts, [N, T]."""
        return ids_NT[:, self.source :] != NOTHING

    def labels(self, ids_NT: Tensor) -> Tensor:
        """The next token of each position, [N, T], -1 for the last; all -1 where a decoder reads its own answer."""
        if self.source:
            return torch.full_like(ids_NT[:, self.source :], -1)
        return torch.cat([ids_NT[:, 1:], torch.full_like(ids_NT[:, :1], -1)], dim=1)


def load_apart(folder: Path, tokens: int) -> Apart:
    """Load a checkpoint in bfloat16 and take its head off.

    Args:
        folder: a CHECKPOINT artifact.
        tokens: length of the windows that it will read; an encoder and a decoder read as many each.

    Raises:
        StageError: the model has no head, its logits are not its head's product alone, or its windows are shorter.
    """
    model = load_model(folder, dtype=torch.bfloat16)
    name = type(model).__name__
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise StageError(f"{name} reads no windows of this length", measured=tokens, limit=most)
    model.config.use_cache = False
    if tokens <= WHOLE_ATTENTION:
        rounded_cache.use(model, "eager")
    two = bool(model.config.is_encoder_decoder)
    ids_1T = torch.arange(min(tokens, 8))[None] % model.config.vocab_size
    read = {"input_ids": ids_1T} | ({"decoder_input_ids": ids_1T} if two else {})
    old = anatomy.head(model)
    assert isinstance(old.weight, Tensor)
    with torch.no_grad():
        expected_TV = model(**read).logits[0].float()
        head = Head(old.weight.detach(), _bias(model, old))
        anatomy.replace(model, old, nn.Identity())
        found_TV = head.logits(model(**read).logits[0]).float()
    if not (found_TV - expected_TV).abs().max() <= LOGIT_TOLERANCE * expected_TV.abs().max():
        raise StageError(
            f"the logits of {name} are not its head's product alone; recovery does not understand it",
            measured=f"difference {float((found_TV - expected_TV).abs().max()):.3g}",
            limit=f"{LOGIT_TOLERANCE} of the largest, {float(expected_TV.abs().max()):.3g}",
        )
    return Apart(model, head, tokens if two else 0)


def _bias(model: PreTrainedModel, head: nn.Module) -> Tensor | None:
    """The head's, with what the model itself adds to the logits, which it adds no longer."""
    found = getattr(head, "bias", None)
    bias_V: Tensor | None = None if found is None else found.detach()
    for name, added in list(model.named_buffers(recurse=False)):
        if added.numel() == model.config.vocab_size:
            model.register_buffer(name, added.new_zeros(1))
            own_V = added.flatten().to(head.weight.dtype)
            bias_V = own_V if bias_V is None else bias_V + own_V
    return bias_V


def embedded_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of embedding and head."""
    tables = {
        id(tensor) for module in (anatomy.embedding(model), anatomy.head(model)) for tensor in module.parameters()
    }
    return {name for name, tensor in model.named_parameters() if id(tensor) in tables}
