"""A checkpoint with an encoder and a decoder that writes, one token after the other, and keeps what it has read.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stages.runtime.contract import StageError
from stages.serving.generate import padded

_NEVER = -1e30
"""The logit of what must not be said: finite, so that two models that must not say it differ by nothing there."""


class Translating:
    """See `stages.serving.generate.Steps`: prompts are what the encoder reads, and the decoder says what comes next.

    As by transformers' own greedy generation the checkpoint's settings force the first token (a language's) and leave
    out single tokens (padding); those that ask for lengths, beams or no repetition are not followed.
    """

    def __init__(
        self, model: PreTrainedModel, *, device: str, computing: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.model, self.device, self.computing = model, device, computing
        self.mask, self.read, self.kept = torch.empty(0), None, None
        self.left_out = [one[0] for one in _setting(model, "bad_words_ids") or () if len(one) == 1]

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Steps. The encoder counts positions from the first column, so that its rows are padded behind."""
        rows = [ids_T[mask_T > 0].tolist() for ids_T, mask_T in zip(ids_NT, mask_NT, strict=True)]
        ids, self.mask = (torch.from_numpy(one).to(self.device) for one in padded(rows))
        with torch.inference_mode(), self.computing():
            self.read = self.model.get_encoder()(input_ids=ids, attention_mask=self.mask, return_dict=True)
        self.kept = None
        logits_NV = self.next(np.full(len(rows), first_token(self.model), dtype=np.int64))
        forced = _setting(self.model, "forced_bos_token_id")
        if forced is not None:
            logits_NV[:] = _NEVER
            logits_NV[:, forced] = 0
        return logits_NV

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Steps."""
        given: dict[str, Any] = {"encoder_outputs": self.read, "attention_mask": self.mask}
        given |= {"decoder_input_ids": torch.from_numpy(tokens_N[:, None]).to(self.device)}
        with torch.inference_mode(), self.computing():
            out = self.model(**given, past_key_values=self.kept, use_cache=True, return_dict=True)
        self.kept = out.past_key_values
        logits_NV: NDArray[np.float32] = out.logits[:, -1].float().cpu().numpy().copy()
        logits_NV[:, self.left_out] = _NEVER
        return logits_NV


def first_token(model: PreTrainedModel) -> int:
    """The token that an answer begins behind.

    Raises:
        StageError: the decoder does not say how an answer begins.
    """
    first = _setting(model, "decoder_start_token_id")
    if first is None:
        raise StageError(
            f"{type(model).__name__} does not say how an answer begins",
            measured="no decoder_start_token_id",
            remedy="Set decoder_start_token_id in config.json.",
        )
    return int(first)


def _setting(model: PreTrainedModel, name: str) -> Any:
    """What generation_config.json says, or else config.json."""
    told = [getattr(one, name, None) for one in (model.generation_config, model.config)]
    return next((one for one in told if one is not None), None)
