"""The layout of compressed-tensors, which vLLM and transformers load: written from quantized layers, and read.

`quantization_config` in config.json says how which maps are stored; their scales lie beside their weights. A table of
INT8 rows and maps that share tensors have no place in it.

Shapes: O outputs, I inputs, W 32-bit words along I.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.models.anatomy import classes
from stages.models.checkpoint import compressed_cache, conversions
from stages.models.layers import quantization_spec, quantized_linear, rounded_cache
from stages.models.layers.quantized_linear import QuantizedLinear
from stages.runtime.contract import StageError

METHOD = "compressed-tensors"

_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_FORMATS = {"int8": "int-quantized", "int4": _PACKED, "fp8_e4m3": "float-quantized"}
_FORMATS |= {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
_SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}
_FORMS: dict[tuple[Any, ...], str] = {
    (8, "int", "channel"): "int8", (8, "int", "tensor"): "int8",
    (8, "float", "channel"): "fp8_e4m3", (8, "float", "tensor"): "fp8_e4m3",
    (4, "int", "group"): "int4", (4, "int", "channel"): "int4",
    (4, "float", "tensor_group"): "nvfp4", (4, "float", "group"): "mxfp4",
}  # fmt: skip
_ZEROS = ("weight_zero_point", "input_zero_point")
_IN_PLACE = (None, "static", "weight")
"""Orders in which GPTQ rounded the columns that leave each in its own block: nothing of them is stored."""
_AS_ONE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pack(q_OI: Tensor, bits: int) -> Tensor:
    """Values of 4 or 8 bits as 32-bit words along I, the first lowest, offset by half their range: int8 -> int32."""
    a_word = 32 // bits
    code_OI = functional.pad(q_OI.int() + 2 ** (bits - 1), (0, -q_OI.shape[1] % a_word))
    shift = torch.arange(0, 32, bits, dtype=torch.int32)
    # The fields do not overlap, so that a sum is an or; it wraps to the negative as the top bit asks.
    return (code_OI.unflatten(1, (-1, a_word)) << shift).sum(2, dtype=torch.int32)


def unpack(word_OW: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack`: int32 -> int8 [O, I]."""
    shift = torch.arange(0, 32, bits, dtype=torch.int32)
    code_OI = ((word_OW[:, :, None] >> shift) & (2**bits - 1)).flatten(1)[:, :inputs]
    return (code_OI - 2 ** (bits - 1)).to(torch.int8)


def write(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], structure: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a quantized model under the names and in the types of the layout, and its `quantization_config`.

    INT8 maps with float inputs are packed like INT4: engines know them in no other way. Of an NVFP4 map the reciprocal
    of its one scale is stored, which moves the weights by one part in ten million.

    Args:
        model: with quantized maps.
        tensors: each distinct tensor of the model under its name.
        structure: the surgery it bears.

    Raises:
        StageError: nothing is quantized, or a table, or the architecture or surgery needs what the layout lacks.
    """
    modules = quantized_linear.quantized_modules(model)
    tables = [name for name, module in modules.items() if not isinstance(module, QuantizedLinear)]
    refuse_inexpressible(model, modules, tables, structure)
    if not modules:
        raise StageError(f"{METHOD} holds quantized checkpoints alone", remedy="Set `layout: enginery`.")
    cache_scheme, cache_scales = compressed_cache.written(model)
    made = {**tensors, **cache_scales}
    groups: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        assert isinstance(module, QuantizedLinear)
        for attribute, _ in module.named_buffers():
            made.pop(f"{name}.{attribute}", None)
        made |= {f"{name}.{key}": tensor for key, tensor in _stored(module).items()}
        group = _described(module)
        groups.setdefault(repr(group), group | {"targets": []})["targets"].append(name)
    formats = {group["format"] for group in groups.values()}
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    return made, {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        "kv_cache_scheme": cache_scheme,
    }


def unlike(model: nn.Module) -> list[str]:
    """Modules whose maps vLLM multiplies as one (q, k and v; gate and up) though they are stored unlike each other.

    It takes one form for all of them, and of NVFP4 maps one scale; transformers takes each as it is.
    """
    found = []
    for path, module in model.named_modules():
        for names in _AS_ONE:
            maps = [getattr(module, name) for name in names if hasattr(module, name)]
            forms = [(repr(_described(one)), one.weight_scale_2) for one in maps if isinstance(one, QuantizedLinear)]
            if forms and (len(forms) < len(maps) or any(form != forms[0] for form in forms)):
                found.append(path)
    return found


def refuse_inexpressible(
    model: PreTrainedModel, maps: Iterable[str], tables: Iterable[str], structure: Iterable[str]
) -> None:
    """Raise StageError where what is to be written needs what the layout lacks.

    Args:
        model: may stand on the meta device.
        maps: paths of what is quantized.
        tables: paths of the tables among it.
        structure: what surgery the model bears.
    """
    places = {path for path, module in classes.plain(model).named_modules() if isinstance(module, Conv1D)}
    for found, what, remedy in (
        (sorted(tables), "table of INT8 rows", "Set `embedding: keep`, or `layout: enginery`."),
        (sorted(places.intersection(maps)), "map that its architecture keeps transposed", "Set `layout: enginery`."),
        (sorted(structure), "layer that is shared, factorized or of another size", "Set `layout: enginery`."),
    ):
        if found:
            raise StageError(f"{METHOD} holds no {what}", measured=", ".join(found[:3]), remedy=remedy)


def _format(module: QuantizedLinear) -> str:
    return _PACKED if module.form.name == "int8" and module.input_form is None else _FORMATS[module.form.name]


def _described(module: QuantizedLinear) -> dict[str, Any]:
    integer = "int" if module.form.name.startswith("int") else "float"
    strategy = "channel" if module.block is None else "tensor_group" if module.form.two_level else "group"
    fixed = {"symmetric": True, "dynamic": False}
    weights = {"num_bits": module.bits, "type": integer, "strategy": strategy, "group_size": module.block} | fixed
    if module.form.name in _SCALES:
        weights["scale_dtype"] = _SCALES[module.form.name]
    inputs = {"num_bits": 8, "type": integer, "strategy": "tensor"} | fixed if module.input_form else None
    return {"format": _format(module), "weights": weights, "input_activations": inputs, "output_activations": None}


def _stored(module: QuantizedLinear) -> dict[str, Tensor]:
    made = {"weight_scale": module.weight_scale if module.block else module.weight_scale[:, None]}
    if module.input_scale is not None:
        made["input_scale"] = module.input_scale.reshape(1)
    if module.bias is not None:
        made["bias"] = module.bias
    if _format(module) == _PACKED:
        q_OI = module.values().to(torch.int8)
        made |= {"weight_packed": pack(q_OI, module.bits), "weight_shape": torch.tensor(q_OI.shape)}
    elif module.bits == 4:
        made["weight_packed"] = module.weight
    else:
        made["weight"] = module.weight
    if module.weight_scale_2 is not None:
        made["weight_global_scale"] = module.weight_scale_2.reciprocal().reshape(1)
    return made


def install(model: PreTrainedModel, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put quantized layers where a checkpoint holds them.

    Args:
        model: as its configuration makes it.
        config: `quantization_config` of config.json.
        stored: the checkpoint's tensors.

    Returns:
        The tensors under the names, and in the types, in which our layers store them.

    Raises:
        StageError: a scheme that our layers do not have, or tensors that do not belong to one.
    """
    for key in ("sparsity_config", "transform_config"):
        if (config.get(key) or {}).get("format", key) != "dense" and config.get(key):
            raise _unknown(f"`{key}` of its quantization_config", config[key])
    cache, tensors = compressed_cache.read(model, config.get("kv_cache_scheme"), stored)
    layers = {}
    maps = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for stem, name in _stems(model, stored).items():
        group = _group(config, name) if name in maps else None
        if f"{stem}.weight_scale" not in stored:
            if group is not None:
                raise StageError(f"{name} has no weight_scale", measured="a float map", limit="a quantized one")
            continue
        if group is None:
            raise _unknown(f"the scale of {name}", "no map that a group of quantization_config names")
        entry = layers[name] = _entry(name, group, maps[name])
        own = {key: tensors.pop(f"{stem}.{key}") for key in _KEYS if f"{stem}.{key}" in tensors}
        tensors |= {f"{stem}.{key}": tensor for key, tensor in _ours(name, own, entry).items()}
    quantization_spec.install(model, {"layers": layers, **cache})
    if cache:
        rounded_cache.install(model, cache["kv_cache"])
    return tensors


_KEYS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "input_scale", *_ZEROS)


def _stems(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Path of everything that the file gives a weight -> its path in the model."""
    stems = dict.fromkeys(name.rpartition(".")[0] for name in stored if name.endswith((".weight", ".weight_packed")))
    named = conversions.named_as(model, [f"{stem}.weight" for stem in stems])
    return {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in named.items()}


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The group of a linear map; None: it stays float."""
    if any(_matches(target, name) for target in config.get("ignore") or ()):
        return None
    groups = config.get("config_groups") or {}
    for group in groups.values():
        if not isinstance(group, Mapping):
            raise _unknown("a group of its quantization_config", group)
        if any(_matches(target, name) for target in group["targets"]):
            return group
    return None


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _entry(name: str, group: Mapping[str, Any], old: nn.Linear) -> dict[str, Any]:
    """What `quantization_spec.install` makes of a map and its group."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    form = _FORMS.get(_scheme(weights))
    size = weights.get("group_size")
    # One scale a row of four-bit integers is a block as long as the row.
    block = (
        size if weights.get("strategy") in ("group", "tensor_group") else old.in_features if form == "int4" else None
    )
    misfit = form is not None and quantized_linear.FORMS[form].block not in (None, block)
    static = all(not one.get("dynamic") and one.get("symmetric", True) for one in (weights, inputs or weights))
    in_place = weights.get("actorder") in _IN_PLACE
    if form is None or misfit or not static or not in_place or group.get("output_activations"):
        raise _unknown(f"the scheme of {name}", f"weights {weights}, inputs {inputs}")
    if inputs is not None and (_scheme(inputs) != (8, weights["type"], "tensor") or weights["num_bits"] != 8):
        raise _unknown(f"the rounding of the inputs of {name}", inputs)
    return {
        "kind": "linear",
        "shape": [old.out_features, old.in_features],
        "format": form,
        "block": block,
        "input": "float" if inputs is None else form,
    }


def _scheme(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return arguments.get("num_bits"), arguments.get("type"), arguments.get("strategy")


def _ours(name: str, theirs: Mapping[str, Tensor], entry: Mapping[str, Any]) -> dict[str, Tensor]:
    if any(not theirs[key].is_meta and theirs[key].any() for key in _ZEROS if key in theirs):
        raise _unknown(f"the zero point of {name}", "a value that is not 0")
    (outputs, inputs), form = entry["shape"], quantized_linear.FORMS[entry["format"]]
    packed = theirs.get("weight_packed")
    scale = theirs["weight_scale"]
    if entry["block"] is None:
        scale = scale.float().flatten().expand(outputs).contiguous()
    elif form.name == "int4" and scale.dtype != form.scale:
        scale = scale.float()
    made = {"weight_scale": scale}
    if packed is None:
        made["weight"] = theirs["weight"]
    elif packed.dtype == torch.int32:
        q_OI = unpack(packed, form.bits, inputs)
        made["weight"] = quantized_linear.pack_int4(q_OI) if form.bits == 4 else q_OI
    else:
        made["weight"] = packed
    if "input_scale" in theirs:
        made["input_scale"] = theirs["input_scale"].float().reshape(())
    if "weight_global_scale" in theirs:
        made["weight_scale_2"] = theirs["weight_global_scale"].float().reshape(()).reciprocal()
    return made


def _unknown(what: str, measured: object) -> StageError:
    return StageError(
        f"{what} is not understood",
        measured=measured,
        limit="static symmetric INT8, INT4 blocks, FP8, NVFP4 and MXFP4 weights; static inputs of a scale a tensor",
        remedy="Give the checkpoint it was made from.",
    )
