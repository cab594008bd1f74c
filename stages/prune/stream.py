"""What the residual stream holds where norms read it, and what is read of it.

Shapes: N windows, T tokens, M tokens at once, H hidden, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.block_calls import arguments, embedded
from stages.models.blockwise.run import run, watched
from stages.models.memory.pages import release


def moment(model: PreTrainedModel, ids_NT: Tensor, advanced: Callable[[int, int], None]) -> Tensor:
    """E[n n^T] of the normalized stream n = x / rms(x), [H, H]: the mean over tokens and over the norms that read it.

    Args:
        model: of the Llama type.
        ids_NT: calibration windows.
        advanced: told (blocks done, blocks).

    Raises:
        StageError: an activation is not finite.
    """
    blocks, calls, x_NTH = anatomy.blocks(model), arguments(model, ids_NT.shape[1]), embedded(model, ids_NT)
    sum_HH, tokens = torch.zeros(x_NTH.shape[-1], x_NTH.shape[-1]), 0

    def see(_name: str, x: Tensor, _y: Tensor) -> None:
        nonlocal tokens
        n_MH = nn.functional.normalize(x.detach().flatten(0, -2).float(), dim=1)
        with torch.autocast("cpu", enabled=False):
            sum_HH.addmm_(n_MH.T, n_MH)
        tokens += len(n_MH)

    for block, kwargs in zip(blocks, calls, strict=True):
        with watched(anatomy.norms(block), see):
            x_NTH = run(block, x_NTH, kwargs)
        release(block.module)
        advanced(block.index + 1, len(blocks))
    see("", x_NTH, x_NTH)
    return sum_HH * (len(sum_HH) / tokens)


def readers(model: PreTrainedModel) -> Tensor:
    """Sum over the maps that read the stream, the head included, of (W G)^T (W G), [H, H]; G is their norm's gain."""
    head = anatomy.head(model)
    sum_HH = _gram(head, anatomy.last_norm(model))
    for block in anatomy.blocks(model):
        maps, norms = anatomy.projections(block), anatomy.norms(block)
        for name, roles in anatomy.READS_NORM.items():
            for role in roles:
                sum_HH += _gram(maps[role], norms[name])
        release(block.module)
    return sum_HH


def _gram(reader: nn.Module, norm: nn.Module) -> Tensor:
    w_OH = reader.get_parameter("weight").detach().float() * norm.get_parameter("weight").detach().float()
    return w_OH.T @ w_OH
