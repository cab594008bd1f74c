"""A checkpoint with an encoder and a decoder by torch: it keeps what it has read.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from stages.runtime.contract import StageError
from stages.serving.answering import Manner

_ASKED = 3
"""Tokens by which a model is asked how it shifts a text."""


class Translating:
    """See `stages.adapters.backends.Stacks`."""

    def __init__(
        self, model: PreTrainedModel, *, device: str, computing: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.model, self.device, self.computing = model, device, computing

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], places: int) -> _Begun:
        """Read the texts; torch makes room as tokens come."""
        ids, mask = (torch.from_numpy(one).to(self.device) for one in (ids_NT, mask_NT))
        with torch.inference_mode(), self.computing():
            read = self.model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        return _Begun(self, {"encoder_outputs": read, "attention_mask": mask})


class _Begun:
    def __init__(self, opened: Translating, given: dict[str, Any]) -> None:
        self.opened, self.given = opened, given
        self.kept: Cache | None = None

    def read(self, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        given = self.given | {"decoder_input_ids": torch.from_numpy(ids_NT).to(self.opened.device)}
        with torch.inference_mode(), self.opened.computing():
            out = self.opened.model(**given, past_key_values=self.kept, use_cache=True, return_dict=True)
        self.kept = out.past_key_values
        logits_NTV: NDArray[np.float32] = out.logits.float().cpu().numpy()
        return logits_NTV

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        rows = torch.from_numpy(rows_N).to(self.opened.device)
        read, mask = self.given["encoder_outputs"], self.given["attention_mask"]
        states = BaseModelOutput(last_hidden_state=read.last_hidden_state.index_select(0, rows))
        self.given = {"encoder_outputs": states, "attention_mask": mask.index_select(0, rows)}
        if self.kept is not None:
            self.kept.reorder_cache(rows)


def manner_of(model: PreTrainedModel) -> Manner:
    """How a model's answers begin; texts that it is asked for itself are `shifted` by the model.

    Raises:
        StageError: it does not say so.
    """
    forced, told = setting(model, "forced_bos_token_id"), setting(model, "eos_token_id")
    ends = told if isinstance(told, list) else [told]
    bad = [int(one[0]) for one in setting(model, "bad_words_ids") or () if len(one) == 1 and one[0] not in ends]
    suppressed = [int(one) for one in setting(model, "suppress_tokens") or ()]
    begins = [int(one) for one in setting(model, "begin_suppress_tokens") or ()]
    left_out = tuple(dict.fromkeys([*bad, *suppressed]))
    return Manner(
        _first_token(model),
        None if forced is None else int(forced),
        left_out,
        wraps=False,
        left_out_first=tuple(begins),
    )


def whole_manner_of(model: PreTrainedModel) -> Manner:
    """The same for who shifts texts without the model.

    Raises:
        StageError: it does not say how answers begin, or shifts a text in a way of its own.
    """
    how = manner_of(model)
    start = how.start
    special = {start, model.config.pad_token_id, model.config.eos_token_id}
    ids_1T = torch.tensor([[one for one in range(_ASKED + len(special)) if one not in special][:_ASKED]])
    found = shifted(model, ids_1T).numpy()
    for one in (how, replace(how, wraps=True)):
        if np.array_equal(found, one.shifted(ids_1T.numpy(), np.array([_ASKED]))):
            return one
    raise StageError(
        f"{type(model).__name__} shifts a text that it is asked for in a way of its own",
        measured=f"{ids_1T[0].tolist()} to {found[0].tolist()}",
        limit=f"{start} or the last token first, and the others behind it",
        remedy="Take `export` and what follows it out of the recipe, and judge the checkpoint itself.",
    )


def shifted(model: PreTrainedModel, ids_NT: Tensor) -> Tensor:
    """The decoder's input when it is asked for these tokens, by the architecture's own way to shift them."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        own: Tensor = model.prepare_decoder_input_ids_from_labels(labels=ids_NT)
        return own
    return torch.cat([torch.full_like(ids_NT[:, :1], _first_token(model)), ids_NT[:, :-1]], dim=1)


def _first_token(model: PreTrainedModel) -> int:
    """The token that an answer begins behind.

    Raises:
        StageError: the decoder does not say how an answer begins.
    """
    first = setting(model, "decoder_start_token_id")
    if first is None:
        raise StageError(
            f"{type(model).__name__} does not say how an answer begins",
            measured="no decoder_start_token_id",
            remedy="Set decoder_start_token_id in config.json.",
        )
    return int(first)


def setting(model: PreTrainedModel, name: str) -> Any:
    """What generation_config.json says, or else config.json."""
    told = [getattr(one, name, None) for one in (model.generation_config, model.config)]
    return next((one for one in told if one is not None), None)
