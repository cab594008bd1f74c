"""A model with an encoder and a decoder as engines call it: one graph that reads the text, one that writes the answer.

The encoder's graph gives what each layer of the decoder looks at in the text, its keys and values, once; the decoder's
takes them beside a cache of its own. Two graphs over one file of weights, not one with a branch: a step then binds the
text's keys and values where they are, and nothing of the encoder is there to be skipped.

Each row of a decoder is on a step of its own: `past_lengths` has a place a row, as in other graphs with a cache, and
positions are counted from there, whether a model has tables of them or a bias by how far apart two tokens are.

Shapes: N sequences, S tokens of the text, T new tokens, K of them asked, M places of the cache, V vocabulary, Q heads
of queries, G of keys and values, D their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from typing_extensions import override

from stages.export import cached
from stages.export.cached import Given, LayerCache, NotCached, Pair, asked_of, at

MASK, CROSS = "attention_mask", "cross"
_NAME = "enginery_two_stacks"
_ROWS, _TEXT, _PLACES, _NEW, _ASKED = 2, 10, 24, 8, 3
"""Sizes to trace by, no two alike."""


class Reading(nn.Module):
    """The encoder, and what the decoder's layers make of what it says."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_NS: Tensor, mask_NS: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of each layer of the decoder, [N, G, S, D]."""
        own, cross = _Heard(), _Heard()
        begun_N1 = torch.zeros_like(ids_NS[:, :1])
        with at(begun_N1):
            self.model(
                input_ids=ids_NS,
                attention_mask=mask_NS,
                decoder_input_ids=begun_N1,  # what comes of it is in no output, and in no graph
                past_key_values=EncoderDecoderCache(own, cross),
                use_cache=True,
                return_dict=True,
            )
        return tuple(tensor for layer in sorted(cross.pairs) for tensor in cross.pairs[layer])


class Saying(nn.Module):
    """The decoder with its cache, and the text's keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids_NT: Tensor,
        lengths_N: Tensor,
        asked_NK: Tensor,
        mask_NS: Tensor,
        cross: Sequence[Pair],
        past: Sequence[Pair],
    ) -> tuple[Tensor, ...]:
        """(logits_NKV, keys and values of each layer with the new ones written, [N, G, M, D])."""
        own = _Own(past, lengths_N, {})
        # Only its shape is looked at: no layer makes keys and values of it once it has them.
        read = torch.zeros(1, 1, self.model.config.hidden_size).expand(*mask_NS.shape, -1)
        positions_NT = lengths_N[:, None] + torch.arange(ids_NT.shape[1])
        with at(positions_NT), apart(self.model.get_decoder(), positions_NT), asked_of(self.model, asked_NK):
            answer = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=read),
                attention_mask=mask_NS,
                decoder_input_ids=ids_NT,
                past_key_values=EncoderDecoderCache(own, _Read(cross)),
                use_cache=True,
                return_dict=True,
            )
        return answer.logits, *(tensor for layer in range(len(past)) for tensor in own.present[layer])


class _Heard(Cache):
    """Keeps the pairs that it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.pairs: dict[int, Pair] = {}

    @override
    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Pair:
        if layer_idx in self.pairs:
            raise NotCached("a layer caches more than one pair of keys and values")
        self.pairs[layer_idx] = key, value
        return key, value

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int | None = None) -> tuple[int, int]:
        return query_length, 0


class _Own(Given):
    """The decoder's own: it is asked how much it holds, by models that count positions themselves."""

    @override
    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.lengths_N[:, None]

    @override
    def get_query_offset(self, layer_idx: int | None = None) -> Any:
        return 0


class _Read(Cache):
    """The text's keys and values, as layers are asked for what they hold."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        # Looked at, not called.
        super().__init__(layers=[_Layer(*pair) for pair in pairs])

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1


class _Layer:
    is_sliding, is_compileable = False, False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


@contextmanager
def apart(decoder: nn.Module, positions_NT: Tensor) -> Iterator[None]:
    """Within it, each row of a decoder stands at positions of its own; transformers has them of all rows alike."""
    with ExitStack() as changes:
        for module in decoder.modules():
            if isinstance(module, nn.Embedding):
                changes.callback(module.register_forward_hook(_of_rows).remove)
            if callable(own := getattr(module, "compute_bias", None)):
                module.__dict__["compute_bias"] = partial(_bias, own, positions_NT)
                changes.callback(module.__dict__.pop, "compute_bias")
        yield


def _of_rows(_module: nn.Module, given: tuple[Any, ...], found: Tensor) -> Tensor:
    """[1, N, T, H] -> [N, T, H]: a table of positions puts an axis of rows before those that it is asked for."""
    return found[0] if isinstance(given[0], Tensor) and found.dim() == given[0].dim() + 2 else found


def _bias(own: Callable[..., Tensor], positions_NT: Tensor, _new: int, places: int, **_others: Any) -> Tensor:
    """[N, Q, T, M]: of how far apart two tokens are, the last of all places has seen everything that there is."""
    bias_QM = own(1, places, past_seen_tokens=places - 1)[0, :, 0]
    place_NTM = places - 1 - (positions_NT[:, :, None] - torch.arange(places))
    return bias_QM[:, place_NTM.clamp(0, places - 1)].transpose(0, 1)


def _seen(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Which tokens of the text, or places of the cache, each token attends to, bool [N, 1, T, S or M]."""
    if attention_mask is None:
        return cached.seen(batch_size, q_length, kv_length, mask_function, **others)
    if others.get("use_vmap"):
        raise NotCached("it attends by a pattern of its own")
    return (attention_mask[:, None, None, :] > 0).expand(-1, 1, q_length, -1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    bias = kwargs.pop("position_bias", None)
    if bias is not None and attention_mask is not None:
        attention_mask = torch.where(attention_mask, bias, torch.finfo(bias.dtype).min)
    return cached.attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _seen)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within it, both stacks attend as their graphs do."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def layer_caches(model: PreTrainedModel) -> tuple[list[LayerCache], list[LayerCache]]:
    """What each layer of the decoder keeps of its answer and of the text, found by asking the model.

    Raises:
        NotCached: it keeps nothing of one of them, or its attention is none that we can call.
    """
    if cached.has_own_attention(model) or model.get_output_embeddings() is None:
        raise NotCached(f"{type(model).__name__} computes attention by itself, or says no tokens")
    own, cross, token = _Heard(), _Heard(), torch.zeros(1, 1, dtype=torch.int64)
    given = {"input_ids": token, "attention_mask": token + 1, "decoder_input_ids": token}
    biased: list[Tensor] = []

    def heard(_module: nn.Module, key: Tensor, _value: Tensor, mask: Tensor | None) -> None:
        if mask is not None and mask.is_floating_point():
            biased.append(key)

    with attending(model), at(token), cached.heard_by(heard):
        model(**given, past_key_values=EncoderDecoderCache(own, cross), use_cache=True, return_dict=True)
    if not own.pairs or sorted(own.pairs) != list(range(len(own.pairs))) or own.pairs.keys() != cross.pairs.keys():
        raise NotCached(f"{len(own.pairs)} of its layers keep its answer and {len(cross.pairs)} the text")

    def described(kept: _Heard) -> list[LayerCache]:
        pairs = [kept.pairs[layer] for layer in sorted(kept.pairs)]
        # What is added to the scores, by how far apart two tokens are, is a pattern of the layer's own.
        windows = [None if any(key is one for one in biased) else 0 for key, _ in pairs]
        return [
            LayerCache(key.shape[1], key.shape[3], value.shape[3], window)
            for (key, value), window in zip(pairs, windows, strict=True)
        ]

    return described(own), described(cross)


def names(layers: int) -> dict[str, tuple[list[str], list[str], dict[str, str]]]:
    """Component -> inputs, outputs, and which output is which input of the next call."""
    inputs, outputs, state = cached.names(layers)
    cross = [f"{CROSS}.{layer}.{one}" for layer in range(layers) for one in cached.STATE]
    places = len(inputs) - len(state)
    return {
        "encoder": ([cached.IDS, MASK], cross, {}),
        "decoder": ([*inputs[:places], MASK, *cross, *inputs[places:]], outputs, state),
    }


def sample(own: Sequence[LayerCache], cross: Sequence[LayerCache]) -> dict[str, tuple[Any, ...]]:
    """Component -> arguments to trace it by."""
    mask_NS = torch.ones(_ROWS, _TEXT, dtype=torch.int64)
    ids_NS, ids_NT = (torch.arange(_ROWS * many).view(_ROWS, many) for many in (_TEXT, _NEW))
    asked_NK, lengths_N = torch.arange(_ROWS * _ASKED).view(_ROWS, _ASKED), torch.tensor([3, 3])
    cross_pairs, past = _pairs(cross, _TEXT), _pairs(own, _PLACES)
    return {"encoder": (ids_NS, mask_NS), "decoder": (ids_NT, lengths_N, asked_NK, mask_NS, cross_pairs, past)}


def _pairs(layers: Sequence[LayerCache], places: int) -> list[Pair]:
    return [
        (torch.zeros(_ROWS, one.heads, places, one.key_size), torch.zeros(_ROWS, one.heads, places, one.value_size))
        for one in layers
    ]


def shapes(layers: int) -> dict[str, dict[str, Any]]:
    """Component -> the axes of those arguments that may have any size."""
    n, s, t, k, m = (torch.export.Dim(name) for name in ("batch", "text", "sequence", "asked", "places"))
    text = {0: n, 1: s}
    return {
        "encoder": {"ids_NS": text, "mask_NS": text},
        "decoder": {
            "ids_NT": {0: n, 1: t},
            "lengths_N": {0: n},
            "asked_NK": {0: n, 1: k},
            "mask_NS": text,
            "cross": [({0: n, 2: s}, {0: n, 2: s})] * layers,
            "past": [({0: n, 2: m}, {0: n, 2: m})] * layers,
        },
    }
