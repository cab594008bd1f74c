"""In which type each tensor of a checkpoint is stored: what came in 16 bits is written in 16 bits.

Stages compute in float32. A tensor is rounded once, when it is written: to the type that its own name had, or, where
surgery made it, to the one in which the checkpoint holds most of its numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.checkpoint import conversions, files
from stages.models.memory.pages import pieces

SHORT = (torch.bfloat16, torch.float16)
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def kept(model: PreTrainedModel, like: Path) -> dict[str, torch.dtype]:
    """Name of a float32 tensor -> the type of 16 bits in which it is written. Scales stay as they are.

    Args:
        model: about to be written; a tensor of several names goes by the first.
        like: the checkpoint that it was made from.

    Raises:
        StageError: `like` has no weights.
    """
    found, shapes = files.dtypes(like), files.shapes(like)
    sizes = Counter[str]()
    for name, kind in found.items():
        sizes[kind] += math.prod(shapes[name]) if kind in _FLOATS else 0
    most = _FLOATS.get(max(sizes, key=sizes.__getitem__, default="F32"))
    told = {new: _FLOATS.get(found[old]) for old, new in conversions.named_as(model, found).items()}
    types: dict[str, torch.dtype] = {}
    for names, tensor in anatomy.distinct_tensors(model):
        # A quantized map keeps its bias as a buffer. Other buffers were never widened, or are scales.
        learned = isinstance(tensor, nn.Parameter) or names[0].endswith(".bias")
        own = next((told[name] for name in names if name in told), most)
        if not learned or tensor.dtype != torch.float32 or classes.left_out(model, names[0], tensor):
            continue
        if own in SHORT:
            types[names[0]] = own
    return types


def of_files(
    laid_out: Mapping[str, Tensor], tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Name in the file -> type in which it is stored; a tensor that several became hands its type to each."""
    told = {id(one): types[name] for name, one in laid_out.items() if name in types}
    whole = {id(one) for one in tensors.values()}
    parted = [types[name] for name, one in laid_out.items() if name in types and id(one) not in whole]
    known = {id(one) for one in laid_out.values()}
    found = {name: told.get(id(one)) if id(one) in known else next(iter(parted), None) for name, one in tensors.items()}
    return {name: kind for name, kind in found.items() if kind is not None and tensors[name].is_floating_point()}


def usual(model: PreTrainedModel, types: Mapping[str, torch.dtype]) -> torch.dtype:
    """The type in which most of a model's parameters are written, as config.json names it."""
    sizes = Counter[torch.dtype]()
    for names, tensor in anatomy.distinct_tensors(model):
        if isinstance(tensor, nn.Parameter) and tensor.dtype in _FLOATS.values():
            sizes[types.get(names[0], tensor.dtype)] += tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=model.dtype)


def widen(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Turn every parameter of another type into one of `dtype` that a file holds, so that its pages can be given back.

    Args:
        model: as it was stored.
        dtype: of its parameters from now on.
        folder: where the file is written. It has no name once it is mapped, and goes with the model.
    """
    narrow = {str(n): one for n, one in enumerate(model.parameters()) if one.dtype != dtype}
    if not narrow:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "widened.safetensors"

    def parts(name: str) -> Iterator[Tensor]:
        for piece in pieces(narrow[name].detach()):
            yield piece.to(dtype)

    files.write_parts(path, {name: (dtype, tuple(one.shape)) for name, one in narrow.items()}, parts)
    for name, tensor in load_file(path).items():
        narrow[name].data = tensor
    path.unlink()
