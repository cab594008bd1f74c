"""What each layer of a decoder keeps of what it has read, found by asking the model.

Shapes: N sequences, T new tokens, M places of the cache, G heads of keys and values, D their size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from stages.export.cached import (
    Given,
    LayerCache,
    NotCached,
    Pair,
    arguments,
    at,
    attending,
    has_own_attention,
    heard_by,
)

_BEYOND = 2
"""Tokens asked behind the largest window when a layer's pattern is read off its mask."""


def layer_caches(model: PreTrainedModel, places: int) -> list[LayerCache]:
    """What each layer keeps, found by asking the model for two tokens behind all others.

    Args:
        model: from `load_model`.
        places: M, more than the largest window of a layer.

    Raises:
        NotCached: a layer keeps nothing or more than keys and values, or its attention is none that we can call.
    """
    own = has_own_attention(model)
    if not _takes_a_cache(model, own=own):
        raise NotCached(f"{type(model).__name__} takes no cache of keys and values, or no places")
    heard: list[tuple[nn.Module, Tensor, Tensor, Tensor | None]] = []
    lengths_N = torch.tensor([places - _BEYOND])
    cache = _Asked(places)
    positions_1T = lengths_N[:, None] + torch.arange(_BEYOND)
    with attending(model), torch.no_grad(), at(positions_1T), heard_by(lambda *call: heard.append(call)):
        model(**arguments(model, torch.zeros(1, _BEYOND, dtype=torch.int64), positions_1T, cache))
    if own and sorted(cache.new) == list(range(len(cache.new))) and cache.new:
        return [LayerCache(*_sizes(cache.new[layer]), None) for layer in sorted(cache.new)]
    if len(heard) != len(cache.new) or sorted(cache.new) != list(range(len(heard))) or not heard:
        raise NotCached(f"{len(heard)} of its layers attend to {len(cache.new)} pairs of keys and values")
    by_layer = zip(sorted(cache.new), heard, strict=True)
    return [LayerCache(*_sizes(cache.new[layer]), _window(mask)) for layer, (_, _, _, mask) in by_layer]


class _Asked(Given):
    """Takes any keys and values and says what they were."""

    def __init__(self, places: int) -> None:
        super().__init__([], torch.empty(0), {})
        self.places, self.new = places, dict[int, Pair]()

    @override
    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Pair:
        if layer_idx in self.new:
            raise NotCached("a layer caches more than one pair of keys and values")
        self.new[layer_idx] = key, value
        # Attention of the model's own looks at them: as many as the mask has places.
        rows, heads, _, size = key.shape
        return (
            key.new_zeros(()).expand(rows, heads, self.places, size),
            value.new_zeros(()).expand(rows, heads, self.places, value.shape[3]),
        )

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int | None = None) -> tuple[int, int]:
        return self.places, 0

    @override
    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.places


def _sizes(pair: Pair) -> tuple[int, int, int]:
    key, value = pair
    if key.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise NotCached("its keys and values are not of one shape")
    return key.shape[1], key.shape[3], value.shape[3]


def _window(mask_11TM: Tensor | None) -> int | None:
    if mask_11TM is None or mask_11TM.dtype is not torch.bool:
        raise NotCached("its attention takes another mask")
    rows_TM, places = mask_11TM[0, 0], mask_11TM.shape[3]
    counts = rows_TM.sum(1).tolist()
    ends = [places - len(counts) + place + 1 for place in range(len(counts))]
    # Each query's own place is the last that it attends to, and no place before it is left out.
    whole = all(bool(row[end - count : end].all()) for row, end, count in zip(rows_TM, ends, counts, strict=True))
    if whole and counts == ends:
        return 0
    return counts[0] if whole and len(set(counts)) == 1 else None


def _takes_a_cache(model: PreTrainedModel, *, own: bool) -> bool:
    takes = set(inspect.signature(model.forward).parameters)
    told = "position_ids" in takes or own  # who has neither an argument for places nor slopes fails its check
    return "past_key_values" in takes and told and model.get_output_embeddings() is not None
