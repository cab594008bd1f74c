"""Tensors that wait on disk until they are needed: what a pass learns of every block is more than one block's work."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Shelf:
    """Tensors by key and name, in a file without a name, which goes with the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places: dict[tuple[Hashable, str], tuple[int, torch.Size, torch.dtype]] = {}

    def __del__(self) -> None:
        self._file.close()

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors.

        Raises:
            OSError: the disk is full.
        """
        for name, one in tensors.items():
            self._places[key, name] = self._file.seek(0, 2), one.shape, one.dtype
            self._file.write(_bytes(one.detach().contiguous()))

    def get(self, key: Hashable, name: str) -> Tensor:
        """Read one."""
        start, shape, dtype = self._places[key, name]
        found = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_bytes(found))
        return found

    def take(self, key: Hashable) -> dict[str, Tensor]:
        """Read all of a key."""
        return {name: self.get(key, name) for one, name in self._places if one == key}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
