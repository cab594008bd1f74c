"""State of a long computation on disk: tensors and a record in one file that is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_state(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a JSON record; a crash at any moment leaves the former file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, new, {"record": json.dumps(dict(record))})
    with new.open("rb") as stream:
        os.fsync(stream.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def settle(path: Path, tensors: Iterable[Tensor]) -> None:
    """Write tensors to a file and let each be a view of it: its pages can be given back, see `pages.forget`."""
    once = {str(n): tensor for n, tensor in enumerate({id(one): one for one in tensors}.values())}
    save_state(path, once, {})
    kept = load_file(path)
    for name, tensor in once.items():
        tensor.data = kept[name]


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a state, None when there is no state."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as opened:
        record: dict[str, Any] = json.loads(opened.metadata()["record"])
    return record


def names(path: Path) -> set[str]:
    """The names of a state's tensors."""
    with safe_open(path, framework="pt") as opened:
        return set(opened.keys())


def restore(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy a state's tensors into those of the same names, in place."""
    with safe_open(path, framework="pt") as opened:
        for name, tensor in tensors.items():
            tensor.detach().copy_(opened.get_tensor(name))
