"""A rounded cache in the layout of compressed-tensors, as vLLM loads it: `kv_cache_scheme`, `k_scale`, `v_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.layers import rounded_cache
from stages.models.layers.rounded_cache import SCALES
from stages.runtime.contract import StageError

_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def written(model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """`kv_cache_scheme` and the scales as the layout shapes them; None and nothing where the cache is float.

    Raises:
        StageError: the cache is in INT8, which vLLM has not.
    """
    spec = rounded_cache.described(model).get("kv_cache")
    if spec is None:
        return None, {}
    if spec["format"] != "fp8_e4m3":
        raise StageError(
            "compressed-tensors holds no scales of such a cache",
            measured=spec["format"],
            limit="fp8_e4m3, the only one that vLLM loads",
            remedy="Set `kv_cache: fp8_e4m3`, or `layout: enginery`.",
        )
    found = rounded_cache.modules(model).items()
    return dict(_FP8), {f"{path}.{name}": getattr(one, name).reshape(1) for path, one in found for name in SCALES}


def read(
    model: PreTrainedModel, scheme: Mapping[str, Any] | None, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `rounded_cache.install` takes, under `kv_cache`, and all tensors with the scales as our modules store them.

    Raises:
        StageError: a scheme other than FP8 with a static scale a tensor, or one without scales.
    """
    if not scheme:
        return {}, dict(stored)
    names = [name for name in stored if name.rpartition(".")[2] in SCALES]
    # What the layout leaves out is an integer.
    if any((_FP8 | {"type": "int"} | dict(scheme))[key] != value for key, value in _FP8.items()) or not names:
        raise StageError(
            "`kv_cache_scheme` of its quantization_config is not understood",
            measured=dict(scheme),
            limit="FP8 with static scales, k_scale and v_scale of every attention",
            remedy="Give the checkpoint it was made from.",
        )
    places = dict(model.named_modules())
    stems = dict.fromkeys(name.rpartition(".")[0] for name in names)
    layers = [stem if stem in places else f"{model.base_model_prefix}.{stem}" for stem in stems]
    made = {name: stored[name].float().reshape(()) for name in names}
    return {"kv_cache": {"format": "fp8_e4m3", "layers": layers}}, {**stored, **made}
