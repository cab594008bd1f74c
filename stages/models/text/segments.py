"""Which of two texts each token is of: told to models that learned it, by the token that stands between both.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.models.text.text_ends import known_word

_TYPES = "token_type_ids"


def separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token behind which the second text begins; None where the tokenizer tells two texts apart otherwise or not.

    One that names no `token_type_ids` among what its model reads was not used with them.
    """
    word, bare = known_word(tokenizer)
    found = tokenizer(word, word)
    ids_T, types_T = torch.tensor(found["input_ids"]), found.get(_TYPES)
    if _TYPES not in tokenizer.model_input_names or not types_T or 1 not in types_T[1:]:
        return None
    between = int(ids_T[types_T.index(1) - 1])
    as_told = segments(ids_T[None], None, between)[0].tolist() == list(types_T)
    return between if as_told and between not in bare else None


def segments(ids_NT: Tensor, mask_NT: Tensor | None, between: int) -> Tensor:
    """0 up to the first token `between` of a row, with it, and 1 behind: int64, [N, T].

    Args:
        ids_NT: tokens.
        mask_NT: which of them count; None for all.
        between: see `separator`.
    """
    ends_NT = (ids_NT == between).long()
    if mask_NT is not None and mask_NT.ndim == 2:
        ends_NT = ends_NT * (mask_NT > 0)
    return (ends_NT.cumsum(1) - ends_NT).clamp(max=1)


def tell(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the model told from now on which text each token is of, as its tokenizer tells, unless its caller says so.

    Raises:
        StageError: the tokenizer writes two texts in no way that is understood.
    """
    between = separator(tokenizer)
    if between is None:
        return

    def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids_NT = args[0] if args else kwargs.get("input_ids")
        if ids_NT is not None and len(args) < 2 and kwargs.get(_TYPES) is None:
            kwargs = kwargs | {_TYPES: segments(ids_NT, kwargs.get("attention_mask"), between)}
        return args, kwargs

    model.base_model.register_forward_pre_hook(add, with_kwargs=True)
