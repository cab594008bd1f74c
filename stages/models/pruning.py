"""What pruning measures of a decoder, block by block, while earlier blocks are pruned already.

Shapes: N windows, T tokens, H hidden, F feed-forward channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.block_influence import influence
from stages.algorithms.channels import least_important, output_error, reconstructed
from stages.models import anatomy
from stages.models.anatomy import Block
from stages.models.shared import SharedLinear
from stages.models.streaming import arguments, check_finite, embedded, run, watched
from stages.models.structure import narrow

Advanced = Callable[[float, float], None]


def channel_parameters(block: Block) -> int:
    """Parameters that one feed-forward channel takes in this block: rows of gate and up, a column of down."""
    maps = anatomy.projections(block)
    count = int(maps["down"].out_features)  # type: ignore[arg-type]
    for role in ("gate", "up"):
        one = maps[role]
        own = one.coefficient if isinstance(one, SharedLinear) else one
        assert isinstance(own, nn.Linear)
        count += own.in_features + (own.bias is not None)
    return count


def narrowed(model: PreTrainedModel, ids_NT: Tensor, width: int, advanced: Advanced) -> list[dict[str, Any]]:
    """Narrow every block to `width` channels, those that cost least gone and `down` fitted again.

    Each block is calibrated on what the narrowed blocks before it give: that is what it will read.

    Returns:
        A row a block: channels before and after, output error of down with its old columns and with the fitted ones.

    Raises:
        StageError: an activation is not finite.
    """
    calls, x_NTH, rows = arguments(model, ids_NT.shape[1]), embedded(model, ids_NT), []
    found = anatomy.blocks(model)
    for block, kwargs in zip(found, calls, strict=True):
        moment_FF = channel_moment(block, x_NTH, kwargs)
        down = anatomy.projections(block)["down"]
        assert isinstance(down, nn.Linear)
        w_OF = down.weight.detach()
        gone = least_important(w_OF, moment_FF, w_OF.shape[1] - width)
        kept_mask = torch.ones(w_OF.shape[1], dtype=torch.bool)
        kept_mask[gone] = False
        kept_K = kept_mask.nonzero().flatten()
        w_OK = reconstructed(w_OF, moment_FF, kept_K)
        rows.append({
            "block": block.index,
            "channels_before": w_OF.shape[1],
            "channels": width,
            "output_error_ratio_cut": output_error(w_OF, moment_FF, kept_K, w_OF[:, kept_K]),
            "output_error_ratio": output_error(w_OF, moment_FF, kept_K, w_OK),
        })  # fmt: skip
        narrow(block, kept_K, w_OK)
        x_NTH = run(block, x_NTH, kwargs)
        advanced(block.index + 1, len(found))
    return rows


def channel_moment(block: Block, x_NTH: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """E[a a^T] of the block's feed-forward channels, [F, F]."""
    sums: list[Tensor] = []

    def see(_name: str, a_1TF: Tensor, _out: Tensor) -> None:
        a_TF = a_1TF.detach().flatten(0, -2)
        product = a_TF.T @ a_TF
        sums[:] = [sums[0] + product] if sums else [product]

    with watched({"down": anatomy.projections(block)["down"]}, see):
        run(block, x_NTH, kwargs)
    moment_FF = sums[0] / (x_NTH.shape[0] * x_NTH.shape[1])
    check_finite(f"{block.name}.{anatomy.path('up')}", moment_FF)
    return moment_FF


def influences(model: PreTrainedModel, ids_NT: Tensor, advanced: Advanced) -> list[float]:
    """Each block's influence on what passes through it.

    Raises:
        StageError: an activation is not finite.
    """
    calls, x_NTH, found = arguments(model, ids_NT.shape[1]), embedded(model, ids_NT), []
    blocks = anatomy.blocks(model)
    for block, kwargs in zip(blocks, calls, strict=True):
        y_NTH = run(block, x_NTH, kwargs)
        found.append(influence(x_NTH.flatten(0, 1), y_NTH.flatten(0, 1)))
        x_NTH = y_NTH
        advanced(block.index + 1, len(blocks))
    return found
