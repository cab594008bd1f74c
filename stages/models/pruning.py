"""What pruning measures of a decoder, block by block, while earlier blocks are pruned already.

Shapes: N windows, T tokens, M = N T, H hidden, F feed-forward channels, K kept ones, O outputs of down.
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
from stages.models.streaming import arguments, embedded, run, watched
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
        y_NTH, a_NTF = activations(block, x_NTH, kwargs)
        a_MF = a_NTF.flatten(0, 1)
        moment_FF = a_MF.T @ a_MF / len(a_MF)
        down = anatomy.projections(block)["down"]
        assert isinstance(down, nn.Linear)
        w_OF = down.weight.detach()
        stays_F = torch.ones(w_OF.shape[1], dtype=torch.bool)
        stays_F[least_important(w_OF, moment_FF, w_OF.shape[1] - width)] = False
        kept_K = stays_F.nonzero().flatten()
        w_OK = reconstructed(w_OF, moment_FF, kept_K)
        rows.append(
            {
                "block": block.index,
                "channels_before": w_OF.shape[1],
                "channels": width,
                "output_error_ratio_cut": output_error(w_OF, moment_FF, kept_K, w_OF[:, kept_K]),
                "output_error_ratio": output_error(w_OF, moment_FF, kept_K, w_OK),
            }
        )
        narrow(block, kept_K, w_OK)
        # The block adds down's output to its own input, so only down's part of the sum changes.
        x_NTH = y_NTH + (a_NTF[..., kept_K] @ w_OK.to(w_OF.dtype).T - a_NTF @ w_OF.T)
        advanced(block.index + 1, len(found))
    return rows


def activations(block: Block, x_NTH: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The block's output y_NTH and its feed-forward channels a_NTF.

    Raises:
        StageError: one of them is not finite.
    """
    seen: list[Tensor] = []
    with watched({"down": anatomy.projections(block)["down"]}, lambda _name, a_1TF, _out: seen.append(a_1TF)):
        y_NTH = run(block, x_NTH, kwargs)
    return y_NTH, torch.cat(seen)


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
