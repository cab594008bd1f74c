"""Checkpoints that other tools quantized, as floats: FP8 with scales, GPTQ, AWQ, bitsandbytes.

What was lost stays lost: the numbers are those with which the other tool's engine multiplies.

Shapes: O outputs, I inputs, G groups of inputs, W words of 32 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.models.checkpoint import compressed_tensors, files
from stages.runtime.contract import Progress, StageError

Parts = Mapping[str, Tensor]
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of a word holds the first, the second, ... of eight columns."""
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class _Form:
    """How one tool stores a map.

    Attributes:
        weight: last part of the name of what holds the values.
        beside: last parts of the names of what belongs to it; one of `needed` must be there.
        floats: (parts by their last names, quantization_config) -> w_OI.
    """

    weight: str
    needed: tuple[str, ...]
    beside: tuple[str, ...]
    floats: Callable[[Parts, Mapping[str, Any]], Tensor]


def _fp8(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """The value times the scale of its block, its row or the tensor: transformers' `Fp8Dequantize`."""
    q_OI = parts["weight"].float()
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    # Exponents may be stored as their bytes.
    scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return q_OI * scale.reshape(())
    if scale.dim() == 1:
        scale = scale[:, None]
    sizes = config.get("weight_block_size") or ()
    for axis, (length, count) in enumerate(zip(q_OI.shape, scale.shape, strict=True)):
        size = sizes[axis] if sizes and -(-length // sizes[axis]) == count else -(-length // count)
        scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return q_OI * scale


def _gptq(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """The scale times (q - zero) of the input's group; the first format stores each zero less one."""
    bits = int(config["bits"])
    q_IO = _fields(parts["qweight"].t(), bits).t()
    zero_GO = _fields(parts["qzeros"], bits)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zero_GO = (zero_GO + 1) & (2**bits - 1)
    scale_GO = parts["scales"].float()
    inputs, groups = q_IO.shape[0], scale_GO.shape[0]
    group_I = parts["g_idx"].long() if "g_idx" in parts else _groups(q_IO, inputs, groups)
    return ((q_IO - zero_GO[group_I]) * scale_GO[group_I]).t()


def _awq(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """The scale times (q - zero) of the input's group, eight outputs a word."""
    order = torch.tensor(_AWQ_ORDER, device=parts["qweight"].device)
    q_IO, zero_GO = (
        _fields(parts[name], 4).unflatten(1, (-1, 8))[:, :, order].flatten(1) for name in ("qweight", "qzeros")
    )
    scale_GO = parts["scales"].float()
    group_I = _groups(q_IO, q_IO.shape[0], scale_GO.shape[0])
    return ((q_IO - zero_GO[group_I]) * scale_GO[group_I]).t()


def _bitsandbytes(parts: Parts, config: Mapping[str, Any]) -> Tensor:
    """INT8 by rows, or 4 bits that stand for the values of a table, times the largest value of their block."""
    if "SCB" in parts:
        return parts["weight"].float() * parts["SCB"].float()[:, None] / 127
    stated = next(parts[name] for name in parts if name.startswith(_STATE))
    state = json.loads(bytes(stated.tolist()))
    peak = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer = parts["weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
        peak = parts["weight.nested_quant_map"].float()[peak.long()] * outer[: peak.numel()] + state["nested_offset"]
    byte = parts["weight"].flatten()
    value = parts["weight.quant_map"].float()[torch.stack([byte >> 4, byte & 15], dim=1).flatten().long()]
    return (value * peak.float().repeat_interleave(int(state["blocksize"]))[: value.numel()]).reshape(state["shape"])


def _fields(word: Tensor, bits: int) -> Tensor:
    """Values of some bits in 32-bit words along the last dimension, the first lowest: int32 [.., W] -> int32."""
    shift = torch.arange(0, 32, bits, dtype=torch.int32, device=word.device)
    return ((word[:, :, None] >> shift) & (2**bits - 1)).flatten(1)


def _groups(like: Tensor, inputs: int, groups: int) -> Tensor:
    return torch.arange(inputs, device=like.device) // -(-inputs // groups)


_FP8 = _Form(
    "weight", ("weight_scale_inv", "weight_scale"), ("input_scale", "activation_scale", "input_scale_ub"), _fp8
)
_FORMS = {
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "gptq": _Form("qweight", ("qzeros",), ("scales", "g_idx"), _gptq),
    "awq": _Form("qweight", ("qzeros",), ("scales",), _awq),
    "bitsandbytes": _Form(
        "weight",
        ("SCB", f"{_STATE}nf4", f"{_STATE}fp4"),
        ("weight_format", *(f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))),
        _bitsandbytes,
    ),
}  # fmt: skip


def method(config: Mapping[str, Any], where: str) -> str | None:
    """What quantized a checkpoint in a way that is understood here; None where it is float, or quantized as ours are.

    Args:
        config: what config.json holds.
        where: its path, for errors.

    Raises:
        StageError: a tool, or a variant of one's format, that is not understood.
    """
    quantization = config.get("quantization_config")
    name = str((quantization or {}).get("quant_method", "another tool"))
    if not quantization or name == compressed_tensors.METHOD:
        return None
    # bitsandbytes of old said only how wide it rounds.
    if "quant_method" not in quantization and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        name = "bitsandbytes"
    bits = {"gptq": (2, 4, 8), "awq": (4,)}.get(name)
    variant = quantization.get("version", "gemm") if name == "awq" else "gemm"
    if name in _FORMS and (bits is None or quantization.get("bits") in bits) and str(variant).lower() == "gemm":
        return name
    described = ", ".join(f"{key} {quantization[key]}" for key in ("bits", "version") if key in quantization)
    raise StageError(
        f"{where} is of a checkpoint that is quantized by {name}",
        measured=described or name,
        limit=f"compressed-tensors, or {', '.join(_FORMS)} (GPTQ of 2, 4 or 8 bits, AWQ of 4 in its gemm version)",
        remedy="Give the checkpoint it was made from; quantize is a step of the recipe.",
    )


def width(config: Mapping[str, Any]) -> torch.dtype:
    """The 16-bit float that a configuration names; bfloat16 where it names none."""
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return torch.float16 if named.removeprefix("torch.") == "float16" else torch.bfloat16


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the floats."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return kept | {"dtype": str(width(config)).removeprefix("torch.")}


def floats(
    config: Mapping[str, Any], name: str, stored: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Callable[[Mapping[str, Tensor]], Tensor]]]:
    """Each tensor of the float checkpoint: its name, its outline on the meta device, and how it is made of `stored`.

    Args:
        config: what config.json holds.
        name: from `method`.
        stored: the file's tensors.

    Raises:
        StageError: values whose scales are missing, or that do not fit them.
    """
    form, dtype = _FORMS[name], width(config)
    beside = (*form.needed, *form.beside)
    stems = {key.removesuffix(f".{form.weight}") for key in stored if key.endswith(f".{form.weight}")}
    stems = {stem for stem in stems if any(f"{stem}.{last}" in stored for last in form.needed)}
    used = {f"{stem}.{last}" for stem in stems for last in (form.weight, *beside)}
    for stem in sorted(stems):
        keys = {last: f"{stem}.{last}" for last in (form.weight, *beside) if f"{stem}.{last}" in stored}

        def made(given: Mapping[str, Tensor], keys: Mapping[str, str] = keys) -> Tensor:
            parts = {last: given[key] for last, key in keys.items()}
            return form.floats(parts, config["quantization_config"]).to(dtype).contiguous()

        yield f"{stem}.weight", _outline(made, keys.values(), stored), made
    for key in sorted(stored.keys() - used):
        if stored[key].is_floating_point() and stored[key].element_size() == 1:
            raise StageError(
                f"{key} is quantized, and the file has no scale for it",
                measured=stored[key].dtype,
                limit=" or ".join(form.needed),
                remedy="Fetch the checkpoint again, or give the one it was made from.",
            )
        yield key, stored[key].to("meta"), itemgetter(key)


def write(config: Mapping[str, Any], name: str, stored: Mapping[str, Tensor], path: Path, progress: Progress) -> None:
    """Write the floats of a quantized checkpoint as one safetensors file; memory holds one of them at a time.

    Raises:
        StageError: as `floats`.
    """
    made = {key: (outline, make) for key, outline, make in floats(config, name, stored)}
    done = 0

    def parts(key: str) -> Iterator[Tensor]:
        nonlocal done
        yield made[key][1](stored)
        done += 1
        progress.advanced(done, len(made))

    files.write_parts(path, {key: (one.dtype, tuple(one.shape)) for key, (one, _) in made.items()}, parts)


def _outline(made: Callable[[Mapping[str, Tensor]], Tensor], keys: Any, stored: Mapping[str, Tensor]) -> Tensor:
    # What says how bitsandbytes stored a map is read; it is a few bytes.
    outlines = {key: stored[key] if _STATE in key else stored[key].to("meta") for key in keys}
    try:
        return made(outlines)
    except (RuntimeError, KeyError, ValueError, IndexError) as error:  # on the meta device no memory can run out
        raise StageError(
            f"the parts of {min(keys)} do not fit each other",
            measured=", ".join(f"{key.rpartition('.')[2]} {tuple(one.shape)}" for key, one in outlines.items()),
            limit=str(error).splitlines()[0],
            remedy="Fetch the checkpoint again, or give the one it was made from.",
        ) from error
