"""Tensors in safetensors files, one at a time: mapped when read, written without a second copy of them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import INDEX, WEIGHTS
from stages.models.memory.pages import pieces
from stages.runtime.contract import StageError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names, in the order in which its own writer lays tensors out: aligned ones first."""

_SHORT = {"U8": 1, "I16": 2}
"""Types in which positions of weights are written, and their bytes."""


def write(path: Path, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype] | None = None) -> None:
    """Write a safetensors file, tensor by tensor, in the bytes that the format's own writer gives.

    A tensor that is the view of a mapped file is given back once it is written.

    Args:
        path: a new file, or one that is replaced and that no tensor is a view of.
        tensors: of any strides; each is stored row-major.
        types: name -> type in which a tensor is stored, where that is not its own.

    Raises:
        StageError: a tensor has a type that the format does not know, or values beyond the one that it is stored in.
    """
    kinds = {name: one.dtype for name, one in tensors.items()} | dict(types or {})
    write_parts(path, {name: (kinds[name], tuple(one.shape)) for name, one in tensors.items()}, _cast(tensors, kinds))


def write_parts(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Callable[[str], Iterable[Tensor]],
) -> None:
    """Write a safetensors file of tensors that are computed piece by piece.

    Args:
        path: as for `write`.
        tensors: name -> type and shape.
        parts: name -> the tensor's values in row-major order, in any number of pieces of its type.

    Raises:
        StageError: a tensor has a type that the format does not know.
    """
    order = {dtype: place for place, dtype in enumerate(_TYPES)}
    if odd := [name for name, (dtype, _) in tensors.items() if dtype not in order]:
        raise StageError(f"{odd[0]} cannot be stored", measured=tensors[odd[0]][0], limit=", ".join(_TYPES.values()))
    names = sorted(tensors, key=lambda name: (order[tensors[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            for part in parts(name):
                if part.numel():
                    data = part.detach().cpu().contiguous().flatten().view(torch.uint8)
                    stream.write(data.numpy().data)


def _cast(tensors: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> Callable[[str], Iterator[Tensor]]:
    def parts(name: str) -> Iterator[Tensor]:
        kind = kinds[name]
        for own in pieces(tensors[name].detach()):
            made = own.to(kind)
            if made.dtype != own.dtype and not made.isfinite().all():
                raise StageError(
                    f"{name} has grown beyond the type in which the checkpoint stores it",
                    measured=f"{float(own.abs().max()):.6g}",
                    limit=f"{torch.finfo(kind).max:.6g}, the largest number of {str(kind).removeprefix('torch.')}",
                    remedy="Begin with the checkpoint in bfloat16: AutoModel...from_pretrained(FOLDER, "
                    'dtype="bfloat16").save_pretrained(NEW).',
                )
            yield made

    return parts


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, a view of its mapped file.

    Raises:
        StageError: a file is missing, cut short or a pickle.
    """
    return read_files(weight_files(folder))


def read_files(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of safetensors files by name, a view of its mapped file.

    Raises:
        StageError: a file is damaged or cut short.
    """
    return {name: opened.get_tensor(name) for name, opened in _places(paths)}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, read from the headers alone.

    Raises:
        StageError: as `read`.
    """
    return {name: tuple(opened.get_slice(name).get_shape()) for name, opened in _places(weight_files(folder))}


def dtypes(folder: Path) -> dict[str, str]:
    """Every tensor's type as the format calls it (F32, BF16, I8, ...), read from the headers alone.

    Raises:
        StageError: as `read`.
    """
    return {name: opened.get_slice(name).get_dtype() for name, opened in _places(weight_files(folder))}


def stored_parameters(folder: Path) -> int:
    """Numbers that a float checkpoint stores, read from the headers alone.

    Short whole numbers say where others stand: they count by their bytes, four a parameter.
    """
    kinds = dtypes(folder)
    return sum(-(-math.prod(shape) * _SHORT.get(kinds[name], 4) // 4) for name, shape in shapes(folder).items())


def _places(paths: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    for file in paths:
        with _opened(file) as opened:
            for name in opened.keys():
                yield name, opened


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise StageError(
            f"{file} is damaged or cut short",
            measured=f"{file.stat().st_size} bytes, {error}",
            remedy="Fetch the checkpoint again.",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        StageError: there are none, one is missing, or they are pickles.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise StageError(
                f"{folder / INDEX} names a file outside the checkpoint",
                limit="names of files beside it",
                remedy="Write the checkpoint again with save_pretrained.",
            )
        files = [folder / name for name in names]
        if lost := [file.name for file in files if not file.is_file()]:
            raise StageError(
                f"{folder} lacks {lost[0]}, which {INDEX} names",
                measured=f"{len(lost)} of {len(files)} shards missing",
                limit="all of them",
                remedy="Fetch the missing shards.",
            )
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise StageError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is loaded",
            limit=WEIGHTS,
            remedy="Convert it where you trust it: model.save_pretrained(folder, safe_serialization=True).",
        )
    raise StageError(f"{folder} has no {WEIGHTS}", remedy="Give a checkpoint in Hugging Face layout.")
