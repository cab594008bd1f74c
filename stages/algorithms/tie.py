"""Find tensors that hold the same values, so that each is stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def equal_groups(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Names of tensors whose shape, type and bytes are equal, in order of their first name.

    Args:
        named: (name, tensor) pairs; a digest of each is kept, never a copy.

    Returns:
        Groups of at least two names.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in named:
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(data.data).digest()
        groups.setdefault((tuple(tensor.shape), tensor.dtype, digest), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
