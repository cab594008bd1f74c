"""Keys and values rounded to eight bits as a decoder caches them: after the rotary embedding, a scale a layer for each.

transformers calls every attention through one interface of functions. A model whose cache is rounded uses one of ours,
which rounds the keys and values that it is given and calls the function that was used before. Rounding with a fixed
scale leaves what lies on its grid where it is, so that an answer is the same with a cache and without one.

Shapes: N sequences, G heads of keys and values, T tokens, D their size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from stages.algorithms.grids import nearest_e4m3
from stages.algorithms.rounding import fake_round
from stages.models.anatomy import blocks as anatomy
from stages.models.layers import quantized_linear
from stages.runtime.contract import StageError

FORMS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
SCALES = ("k_scale", "v_scale")
"""Names of the buffers of an attention module, as engines call them."""
Heard = Callable[[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], None]
"""(module, key_NGTD, value_NGTD, attention): `attention` gives the outputs for other keys and values."""

STEPWISE = "stepwise"
"""Name of an attention for writing token by token: like `eager`, in a sixth of the time where heads share keys."""
_PREFIX = "rounded_cache_"
_FORM = "cache_form"
_listeners: list[Heard] = []


def rounded(x: Tensor, scale: Tensor | float, form: str) -> Tensor:
    """Keys or values as an engine reads them back from a cache of this form, of x's type."""
    if torch.compiler.is_exporting():
        assert isinstance(scale, Tensor)
        return quantized_linear.round_trip(x, scale, FORMS[form])
    wide = x.float()
    near = fake_round(wide, scale) if form == "int8" else nearest_e4m3(wide / scale) * scale
    return near.to(x.dtype)


def rounded_pair(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as the cache of an attention module holds them; what no cache rounds stays."""
    if (form := getattr(module, _FORM, None)) is None:
        return key, value
    k_scale, v_scale = (module.get_buffer(name) for name in SCALES)
    return rounded(key, k_scale, form), rounded(value, v_scale, form)


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        plain = _plain(module, base)
        for heard in _listeners:
            heard(module, key, value, lambda k, v: plain(module, query.to(k.dtype), k, v, attention_mask, **kwargs)[0])
        key, value = rounded_pair(module, key, value)
        found: tuple[Tensor, Tensor | None] = plain(module, query, key, value, attention_mask, **kwargs)
        return found

    return attention


def _plain(module: nn.Module, base: str) -> Callable[..., Any]:
    """The function that the module would have called; each architecture brings its own `eager` one."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, own)
    return found


for _base in ("sdpa", "eager"):
    AttentionInterface.register(_PREFIX + _base, _attention(_base))
    AttentionMaskInterface.register(_PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


def _stepwise(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The module's own `eager` attention; of a single token without a copy of keys and values for each head."""
    groups, scaling = key.shape[1], kwargs.get("scaling")
    unlike = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "head_mask"))
    alike = attention_mask is None or (attention_mask.ndim == 4 and attention_mask.shape[1] == 1)
    if query.shape[2] != 1 or query.shape[1] == groups or unlike or not alike or scaling is None:
        found: tuple[Tensor, Tensor | None] = _plain(module, "eager")(
            module, query, key, value, attention_mask, **kwargs
        )
        return found
    # The heads that share keys and values stand side by side, as if they were tokens.
    score_NGRT = query.squeeze(2).unflatten(1, (groups, -1)) @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        score_NGRT = score_NGRT + attention_mask
    out_NGRD = score_NGRT.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return out_NGRD.flatten(1, 2)[:, None], None


AttentionInterface.register(STEPWISE, _stepwise)
AttentionMaskInterface.register(STEPWISE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Within it, the model computes attention by another implementation; only one of ours rounds its cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def use(model: PreTrainedModel, base: str | None = None) -> None:
    """Let the model compute attention by `sdpa` or `eager`, None for what it uses, rounding what it rounds."""
    model.set_attn_implementation((_PREFIX if described(model) else "") + (base or _base_of(model)))


def _base_of(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation).removeprefix(_PREFIX)


def put(model: PreTrainedModel, form: str, scales: Mapping[str, tuple[float, float]]) -> None:
    """Give attention modules, by path, their scales of keys and values; strictly positive."""
    for path, pair in scales.items():
        module = model.get_submodule(path)
        setattr(module, _FORM, form)
        for name, scale in zip(SCALES, pair, strict=True):
            module.register_buffer(name, torch.tensor(scale))
    use(model)


def install(model: PreTrainedModel, spec: Mapping[str, Any]) -> None:
    """Make the places for the scales of a checkpoint; the caller loads them.

    Args:
        model: as its configuration makes it.
        spec: {"format": a name of FORMS, "layers": [path of an attention module, ...]}.

    Raises:
        StageError: the format is unknown, or the model has no such module.
    """
    if spec["format"] not in FORMS:
        raise StageError(f"a cache in {spec['format']!r} is not understood", limit=", ".join(FORMS))
    places = dict(model.named_modules())
    if strange := sorted(set(spec["layers"]) - places.keys()):
        raise StageError(f"quantization.json rounds the cache of {strange[0]}, which the model has not")
    put(model, spec["format"], dict.fromkeys(spec["layers"], (1.0, 1.0)))


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> attention module whose keys and values are rounded."""
    return {path: module for path, module in model.named_modules() if hasattr(module, _FORM)}


def described(model: nn.Module) -> dict[str, Any]:
    """{"kv_cache": the spec from which `install` makes the same again}; nothing where no cache is rounded."""
    found = modules(model)
    if not found:
        return {}
    return {"kv_cache": {"format": getattr(next(iter(found.values())), _FORM), "layers": list(found)}}


def scales(model: nn.Module) -> list[float]:
    """Of the keys and values of every layer."""
    return [float(getattr(module, name)) for module in modules(model).values() for name in SCALES]


def left_float(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within it, the model rounds no key and no value."""
    return by(model, _base_of(model)) if modules(model) else nullcontext()


@contextmanager
def listening(model: PreTrainedModel, heard: Heard) -> Iterator[None]:
    """Call `heard` whenever a module of the model calls its attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_PREFIX + _base_of(model))
    _listeners.append(heard)
    try:
        yield
    finally:
        _listeners.remove(heard)
        model.set_attn_implementation(before)


@torch.no_grad()
def attentions(model: PreTrainedModel) -> dict[int, str]:
    """Index of each block -> path of its attention module, whose keys and values a decoder caches as it reads them.

    A few tokens are read with a cache: what every attention is given must be what the cache holds.

    Raises:
        StageError: the model is no decoder, has no such cache, or a block's attention is called in another way.
    """
    blocks, name = anatomy.blocks(model), type(model).__name__
    if model.config.is_encoder_decoder or any(block.stack != "decoder" for block in blocks):
        raise StageError(
            f"{name} is no decoder alone: no cache of it is rounded",
            measured=", ".join(sorted({block.stack for block in blocks})),
            limit="decoder",
            remedy="Set `kv_cache: keep`.",
        )
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    with listening(model, lambda module, key, value, _attention: calls.append((module, key, value))):
        answer = anatomy.decoder(model)(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    cache = getattr(answer, "past_key_values", None)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    paths = {id(module): path for path, module in model.named_modules()}
    attention_paths = {}
    for block in blocks:
        inside = {id(module) for module in block.module.modules()}
        here = [call for call in calls if id(call[0]) in inside]
        if len(here) != 1 or not _cached(here[0][1:], layers):
            raise StageError(
                f"the attention of {block.name} is not understood: its cache cannot be rounded",
                measured=f"{len(here)} calls of transformers' attention interface in {type(block.module).__name__}",
                limit="one, of the keys and values that the cache holds",
                remedy="Set `kv_cache: keep`.",
            )
        attention_paths[block.index] = paths[id(here[0][0])]
    return attention_paths


def _cached(given: Sequence[Tensor], layers: Sequence[Any]) -> bool:
    """Whether some layer of a cache holds these keys and values; one of a sliding window may hold a copy."""
    held = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return any(all(_same(one, mine) for one, mine in zip(given, pair, strict=True)) for pair in held)


def _same(given: Tensor, held: Tensor | None) -> bool:
    if held is given:
        return True
    if held is None or held.shape != given.shape:
        return False
    return held.is_meta or torch.equal(held.nan_to_num(), given.nan_to_num())  # meta tensors have shapes alone
