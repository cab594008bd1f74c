"""A checkpoint's numbers in 16 bits: half the bytes of float32, and nothing that an engine has to know of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.checkpoint import editing, kept_zeros
from stages.models.checkpoint.files import dtypes, shapes
from stages.models.checkpoint.loading import save_model
from stages.models.layers import rounded_cache
from stages.models.layers.quantization_spec import annotate
from stages.quantize import cache_ranges, plan
from stages.quantize.params import QuantizeParams
from stages.runtime.contract import PARTIAL, Metrics, Progress, StageError

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_STORED = {"fp16": "F16", "bf16": "BF16"}
_WIDE = ("F32", "F64")
_SCALE = "_scale"
"""How the names of scales of a rounded cache end: they stay as they are."""


def in_sixteen_bits(params: QuantizeParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Every number of a checkpoint in 16 bits, from the float checkpoint to the written one.

    Raises:
        StageError: the checkpoint is quantized already or in 16 bits, a cache's ranges need a text, or a tensor holds
            values beyond the range.
    """
    model = plan.opened(inputs["model"], output / PARTIAL)
    block_parameters = anatomy.block_parameters(model)
    every = [f"{block.name}.{path}" for block in anatomy.blocks(model) for path in anatomy.linear_maps(block)]
    maps = editing.matching(every, params.layers, params.skip)
    text_NT = plan.calibration_windows(params, inputs, progress, fitted=False)
    plan.check_cache(params, model)
    caches = plan.rounded_caches(params, model, text_NT)
    rows = store(model, params.scheme, maps)  # last: arithmetic of 16 bits is slow where ranges are measured
    numbers = sum(one.numel() for _, one in anatomy.distinct_tensors(model) if one.dtype == FORMATS[params.scheme])
    annotate(model, {"scheme": params.scheme, **rounded_cache.described(model)}, {})
    written = save_model(model, output, like=inputs["model"], progress=progress)
    editing.write_table(output, [*rows, *caches], scheme=params.scheme)
    progress.note(f"{len(maps)} maps and all else in 16 bits")
    return {
        **proven(inputs["model"], output, params.scheme, numbers),
        **(cache_ranges.proven(output, caches) if caches else {}),
        **kept_zeros.carried(inputs["model"], written, output),
        "quantized_maps": float(len(maps)),
        "kept_maps": 0.0,
        "rotated_maps": 0.0,
        "block_parameters": float(block_parameters),
        "bits_per_weight": 16.0,
        "largest_error_ratio": max((row["error"] for row in rows), default=0.0),
    }


@torch.no_grad()
def store(model: PreTrainedModel, form: str, maps: Sequence[str]) -> list[dict[str, Any]]:
    """Cast every floating tensor that is stored, to nearest: tables, norms, biases and these maps of the blocks.

    What is one tensor stays one. A tensor that several maps share stays as it is if one of them was left out.

    Args:
        model: is changed.
        form: `fp16` or `bf16`.
        maps: paths of the blocks' maps; those left out stay as they are.

    Returns:
        A row a tensor: its path, its format and the relative squared error of the rounding.

    Raises:
        StageError: a tensor holds values beyond the range of fp16.
    """
    dtype = FORMATS[form]
    kept = _left_out(model, maps)
    blocks = anatomy.blocks(model)
    made: dict[int, Tensor] = {}
    rows = []
    named = list(anatomy.named_tensors(model))  # held until the end, since a freed tensor's id may come again
    for name, old in named:
        computed = name.endswith(_SCALE) or classes.left_out(model, name, old)
        if id(old) in made or id(old) in kept or computed or not old.is_floating_point():
            continue
        new = _cast(name, old.detach(), dtype)
        made[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        missed = (new.float() - old).square().sum() / old.square().sum().clamp_min(1e-30)
        block = next((one.index for one in blocks if name.startswith(f"{one.name}.")), None)
        layer = name.removesuffix(".weight")
        rows.append({"layer": layer, "block": block, "format": form, "error": float(missed)})
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own |= {key: made[id(one)] for key, one in own.items() if id(one) in made}
    return rows


def _left_out(model: PreTrainedModel, names: Sequence[str]) -> set[int]:
    every = {f"{block.name}.{path}" for block in anatomy.blocks(model) for path in anatomy.linear_maps(block)}
    return {id(one) for name in every.difference(names) for one in model.get_submodule(name).parameters()}


def _cast(name: str, old: Tensor, dtype: torch.dtype) -> Tensor:
    new = old.to(dtype)
    if not new.isfinite().all():
        raise StageError(
            f"{name} holds values beyond the range of {str(dtype).removeprefix('torch.')}",
            measured=f"{float(old.abs().max()):.6g}",
            limit=f"{torch.finfo(dtype).max:.6g}",
            remedy="Set `scheme: bf16`, or name the map in `skip`.",
        )
    return new


def proven(before: Path, after: Path, form: str, numbers: int) -> Metrics:
    """Count the tensors of 16 bits, and their numbers, in the written bytes: a file holds each expert by itself.

    Raises:
        StageError: the checkpoint had none of more bits to begin with, or one that was cast is not written so.
    """
    stored = dtypes(after)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (before, after)]
    if not any(dtype in _WIDE for dtype in dtypes(before).values()):
        raise StageError(
            "the checkpoint holds no tensor of more than 16 bits",
            measured=", ".join(sorted(set(dtypes(before).values()))),
            limit="at least one in float32",
            remedy="Drop the step.",
        )
    halved = [name for name, dtype in stored.items() if dtype == _STORED[form]]
    long = shapes(after)
    written = sum(math.prod(long[name]) for name in halved)
    if written < numbers or sizes[1] >= sizes[0]:
        raise StageError(
            "the written checkpoint is not in 16 bits",
            measured=f"{written} of {numbers} numbers, {sizes[1]} bytes",
            limit=f"all of them, fewer than {sizes[0]} bytes",
            remedy="This is a defect: please report it with the recipe.",
        )
    return {"halved_tensors": float(len(halved)), "size_bytes": float(sizes[1]), "size_bytes_before": float(sizes[0])}
