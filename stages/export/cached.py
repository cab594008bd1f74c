"""A decoder as engines call it to write: new tokens go in beside the keys and values of those before them.

transformers hands a cache to each attention and calls every attention through one interface of functions. Ours writes
the new keys and values where each row goes on and attends by one operator to all that stands there, so that prompt and
step are one graph, rows may be of unequal length, and nothing of the past is computed or copied again.

Shapes: N sequences, T new tokens, K of them asked, M places of the cache, V vocabulary, Q heads of queries, G of keys
and values, D their size, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import ops
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from typing_extensions import override

from stages.models.layers import rounded_cache

OPSET = 24
"""The first that writes into a cache and attends to a part of it."""
IDS, LENGTHS, ASKED, LOGITS = "input_ids", "past_lengths", "logits_at", "logits"
STATE = ("key", "value")
_NAME = "enginery_cached"
_TRACED = 23
"""The newest opset that torch writes; what is newer here changes nothing of what it wrote."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerCache:
    """What a layer keeps.

    Attributes:
        heads: of keys and values, G.
        key_size: D of the keys.
        value_size: D of the values.
        window: tokens that a query attends to at most, itself among them; 0 for all before it; None where the layer's
            pattern is another.
    """

    heads: int
    key_size: int
    value_size: int
    window: int | None

    def described(self) -> dict[str, Any]:
        """As `graph.json` says it."""
        return asdict(self)


class NotCached(Exception):
    """Why a model keeps nothing in a graph; it is told, and the engine reads its text anew for each token."""


class Decoder(nn.Module):
    """The model with its cache as inputs and outputs."""

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self._rounding = {getattr(m, "layer_idx", None): m for m in rounded_cache.modules(model).values()}

    def forward(self, ids_NT: Tensor, lengths_N: Tensor, asked_NK: Tensor, past: Sequence[Pair]) -> tuple[Tensor, ...]:
        """(logits_NKV, keys and values of each layer with the new ones written, [N, G, M, D])."""
        positions_NT = lengths_N[:, None] + torch.arange(ids_NT.shape[1])
        cache = Given(past, lengths_N, self._rounding)
        with at(positions_NT), asked_of(self.model, asked_NK):
            answer = self.model(**arguments(self.model, ids_NT, positions_NT, cache))
        present = [cache.present.get(layer) for layer in range(self.layers)]
        return answer.logits, *(tensor for pair in present if pair is not None for tensor in pair)


class Given(Cache):
    """transformers' face of a cache that is given."""

    def __init__(self, past: Sequence[Pair], lengths_N: Tensor, rounding: dict[Any, nn.Module]) -> None:
        super().__init__(layers=[])
        self.past, self.lengths_N, self.rounding = past, lengths_N, rounding
        self.present: dict[int, Pair] = {}

    @override
    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Pair:
        if layer_idx in self.present:
            raise NotCached("a layer caches more than one pair of keys and values")
        new = (key, value)
        if (module := self.rounding.get(layer_idx)) is not None:
            new = rounded_cache.rounded_pair(module, key, value)
        key_past, value_past = self.past[layer_idx]
        self.present[layer_idx] = self._written(key_past, new[0]), self._written(value_past, new[1])
        return self.present[layer_idx]

    def _written(self, past: Tensor, new: Tensor) -> Tensor:
        return ops.symbolic(
            "::TensorScatter",
            (past, new, self.lengths_N),
            {"axis": 2, "mode": "linear"},
            dtype=past.dtype,
            shape=past.shape,
            version=_TRACED,
        )

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @override
    def get_query_offset(self, layer_idx: int | None = None) -> int:
        return 0

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int | None = None) -> tuple[int, int]:
        return self.past[layer_idx or 0][0].shape[2], 0

    @override
    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.past[layer_idx or 0][0].shape[2]

    @property
    @override
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.past)

    @property
    @override
    def is_compileable(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.past)


def has_own_attention(model: PreTrainedModel) -> bool:
    """Whether attention is computed by the model itself, not through transformers' interface of functions."""
    return not type(model)._can_set_attn_implementation()


def arguments(model: PreTrainedModel, ids_NT: Tensor, positions_NT: Tensor, cache: Cache) -> dict[str, Any]:
    """How a model is called for new tokens behind a cache."""
    given: dict[str, Any] = {"input_ids": ids_NT, "past_key_values": cache, "use_cache": True, "return_dict": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = positions_NT
    if has_own_attention(model):  # it counts places for its slopes by the mask
        given["attention_mask"] = torch.ones(ids_NT.shape[0], cache.get_mask_sizes(1, 0)[0], dtype=torch.int64)
    return given


_positions: list[Tensor] = []
_heard: list[Callable[[nn.Module, Tensor, Tensor, Tensor | None], None]] = []


@contextmanager
def heard_by(listener: Callable[[nn.Module, Tensor, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Within it, a listener hears (module, key, value, mask) of every attention."""
    _heard.append(listener)
    try:
        yield
    finally:
        _heard.pop()


@contextmanager
def at(positions_NT: Tensor) -> Iterator[None]:
    """Within it, the model reads tokens at these places."""
    _positions.append(positions_NT)
    try:
        yield
    finally:
        _positions.pop()


@contextmanager
def asked_of(model: PreTrainedModel, asked_NK: Tensor) -> Iterator[None]:
    """Within it, the model's head reads these tokens alone."""
    head = model.get_output_embeddings()
    assert head is not None
    # Before the head, not behind it: rows of the vocabulary that nobody asks for are not made.
    hook = head.register_forward_pre_hook(lambda _module, args: (_rows(args[0], asked_NK),))
    try:
        yield
    finally:
        hook.remove()


def _rows(hidden: Tensor, asked_NK: Tensor) -> Tensor:
    return hidden.gather(1, asked_NK[:, :, None].expand(-1, -1, hidden.shape[2]))


def seen(batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **others: Any) -> Tensor:
    """Which places of the cache each new token attends to, bool [N, 1, T, M]."""
    if others.get("use_vmap"):
        raise NotCached("it attends by a pattern of its own")
    sequence_N111 = torch.arange(batch_size)[:, None, None, None]
    head, place_M = torch.zeros((), dtype=torch.int64), torch.arange(kv_length)
    return mask_function(sequence_N111, head, _positions[-1][:, None, :, None], place_M[None, None, None])


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as one operator over all that is given, in transformers' face of it."""
    for heard in _heard:
        heard(module, key, value, attention_mask)
    if unknown := [name for name in ("s_aux", "position_bias", "head_mask") if kwargs.get(name) is not None]:
        raise NotCached(f"its attention takes {unknown[0]}")
    if attention_mask is None:
        raise NotCached("its attention takes no mask")
    scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    told: dict[str, Any] = {"scale": float(query.shape[3] ** -0.5 if scaling is None else scaling)}
    found_NQTD = ops.symbolic(
        "::Attention",
        (query, key, value, attention_mask),
        told if softcap is None else told | {"softcap": float(softcap)},
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=_TRACED,
    )
    return found_NQTD.transpose(1, 2), None


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, seen)


def _added(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The same as what is added to the products of queries and keys."""
    return torch.where(seen(*args, **kwargs), 0.0, torch.finfo(dtype).min)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model attends as a graph with a cache does; attention of its own reads all places, masked."""
    before = model.config._attn_implementation
    if has_own_attention(model):
        # By products and a softmax: torch's fused operator may be called with fewer heads of keys than of queries,
        # which the exporter does not take.
        model.config._attn_implementation = "eager"
        ours = {sdpa_mask: seen, eager_mask: _added}
        changed = {name: made for name, made in ALL_MASK_ATTENTION_FUNCTIONS.items() if made in ours}
        ALL_MASK_ATTENTION_FUNCTIONS.update({name: ours[made] for name, made in changed.items()})
        try:
            yield
        finally:
            ALL_MASK_ATTENTION_FUNCTIONS.update(changed)
            model.config._attn_implementation = before
        return
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def sample(layers: Sequence[LayerCache], vocabulary: int) -> tuple[Any, ...]:
    """Arguments of `Decoder.forward` to trace it by: two rows, no two sizes alike."""
    rows, places = 2, 24
    past = [
        tuple(torch.zeros(rows, one.heads, places, size) for size in (one.key_size, one.value_size)) for one in layers
    ]
    ids_NT = torch.arange(8 * rows).view(rows, 8) % vocabulary
    return ids_NT, torch.tensor([3, 5]), torch.arange(3 * rows).view(rows, 3) % 8, past


def shapes(layers: Sequence[LayerCache]) -> dict[str, Any]:
    """The axes of those arguments that may have any size."""
    n, t, k, m = (torch.export.Dim(name) for name in ("batch", "sequence", "asked", "places"))
    pair = ({0: n, 2: m}, {0: n, 2: m})
    return {"ids_NT": {0: n, 1: t}, "lengths_N": {0: n}, "asked_NK": {0: n, 1: k}, "past": [pair] * len(layers)}


def names(layers: int) -> tuple[list[str], list[str], dict[str, str]]:
    """Inputs, outputs, and which output is which input of the next call."""
    state = {f"past_key_values.{i}.{one}": f"present.{i}.{one}" for i in range(layers) for one in STATE}
    return [IDS, LENGTHS, ASKED, *state], [LOGITS, *state.values()], state
