"""Surgery that removes: feed-forward channels, heads and whole blocks. Configuration and modules stay in step.

Shapes: F feed-forward channels, K kept, O outputs, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.roles import ATTENTION, FEED_FORWARD
from stages.models.layers.low_rank_linear import SharedLinear
from stages.runtime.contract import StageError


def check_channels_free(model: PreTrainedModel) -> None:
    """Raise StageError where a block's feed-forward channels cannot go alone.

    Raises:
        StageError: `down` stands on a basis with other blocks, whose columns are their channels too, or a feed-forward
            tensor is tied to another.
    """
    _check_free(model, FEED_FORWARD, "down", "channels")


def check_heads_free(model: PreTrainedModel) -> None:
    """Raise StageError where a block's heads cannot go alone; as `check_channels_free`."""
    _check_free(model, ATTENTION, "o", "heads")


def _check_free(model: PreTrainedModel, roles: tuple[str, ...], reader: str, what: str) -> None:
    owners: dict[int, str] = {}
    for block in anatomy.blocks(model):
        maps = anatomy.projections(block)
        for role in roles:
            name = f"{block.name}.{anatomy.path(role)}"
            own = reading(maps[role]) if role == reader else writing(maps[role])
            if not isinstance(own, nn.Linear):
                raise StageError(f"{name} is no dense map", remedy="Prune first, quantize and share afterwards.")
            twin = owners.setdefault(id(own.weight), name)
            if twin != name and role == reader and isinstance(maps[role], SharedLinear):
                raise StageError(
                    f"{name} stands on a basis whose inputs are the {what} of several blocks",
                    remedy=f"Leave `{reader}` out of share's projections, or prune before sharing it.",
                )
            if twin != name:
                raise StageError(f"{name} is tied to {twin}; its {what} cannot go alone", remedy="Prune before tying.")


def reading(one: nn.Module) -> nn.Module:
    """The part of a map that reads its inputs: its basis, where it stands on one."""
    return one.basis if isinstance(one, SharedLinear) else one


def writing(one: nn.Module) -> nn.Module:
    """The part of a map that writes its outputs: its coefficient, where it stands on a basis."""
    return one.coefficient if isinstance(one, SharedLinear) else one


def parameters_without(model: PreTrainedModel, dropped: Sequence[int]) -> int:
    """Parameters in the blocks that are left when these are gone, each distinct tensor counted once."""
    left = [block for block in anatomy.blocks(model) if block.index not in dropped]
    return sum({id(one): one.numel() for block in left for one in block.module.parameters()}.values())


def narrow(block: Block, kept_K: Tensor, down_OK: Tensor) -> None:
    """Keep only some feed-forward channels.

    Args:
        block: its gate, up and down lose rows or columns; a shared basis is not touched.
        kept_K: ascending indices of the channels that stay.
        down_OK: the new weight of down, or of its basis.
    """
    for role in ("gate", "up"):
        _keep_outputs(block, role, kept_K)
    _replace_inputs(block, "down", down_OK)


def drop_heads(block: Block, kept_K: Tensor, o_OK: Tensor, size: int) -> None:
    """Keep only some groups of heads.

    Args:
        block: its q, k, v and o lose rows or columns; a shared basis is not touched.
        kept_K: ascending indices of the heads' outputs that stay, whole key-value groups.
        o_OK: the new weight of o, or of its basis.
        size: outputs of the query heads of one key-value group.
    """
    keys = anatomy.projections(block)["k"]
    groups = int(anatomy.projections(block)["o"].in_features) // size  # type: ignore[arg-type]
    dim = int(keys.out_features) // groups  # type: ignore[arg-type]
    rows_gd = torch.arange(groups * dim).view(groups, dim)
    kept_g = kept_K[::size] // size
    _keep_outputs(block, "q", kept_K)
    for role in ("k", "v"):
        _keep_outputs(block, role, rows_gd[kept_g].flatten())
    _replace_inputs(block, "o", o_OK)


def _keep_outputs(block: Block, role: str, kept_K: Tensor) -> None:
    own = writing(anatomy.projections(block)[role])
    assert isinstance(own, nn.Linear)
    own.weight = nn.Parameter(own.weight.detach()[kept_K].contiguous())
    own.out_features = len(kept_K)
    if own.bias is not None:
        own.bias = nn.Parameter(own.bias.detach()[kept_K].contiguous())


def _replace_inputs(block: Block, role: str, w_OK: Tensor) -> None:
    reader = reading(anatomy.projections(block)[role])
    assert isinstance(reader, nn.Linear)
    reader.weight = nn.Parameter(w_OK.to(reader.weight.dtype).contiguous())
    reader.in_features = w_OK.shape[1]
