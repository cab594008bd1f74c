"""Surgery that removes: feed-forward channels and whole blocks. Configuration and modules stay in step.

Shapes: F feed-forward channels, K kept, O outputs, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models import anatomy
from stages.models.anatomy import Block
from stages.models.shared import SharedLinear
from stages.runtime.contract import StageError


def check_channels_free(model: PreTrainedModel) -> None:
    """Raise StageError where a block's channels cannot go alone.

    Raises:
        StageError: `down` stands on a shared basis, whose columns are other blocks' channels too, or a feed-forward
            tensor is tied to another.
    """
    owners: dict[int, str] = {}
    for block in anatomy.blocks(model):
        maps = anatomy.projections(block)
        for role in anatomy.FEED_FORWARD:
            name = f"{block.name}.{anatomy.path(role)}"
            one = maps[role]
            if role == "down" and isinstance(one, SharedLinear):
                raise StageError(
                    f"{name} stands on a basis whose inputs are the channels of several blocks",
                    remedy="Leave `down` out of share's projections, or prune before sharing it.",
                )
            own = one.coefficient if isinstance(one, SharedLinear) else one
            if not isinstance(own, nn.Linear):
                raise StageError(f"{name} is quantized", remedy="Prune first, quantize afterwards.")
            twin = owners.setdefault(id(own.weight), name)
            if twin != name:
                raise StageError(
                    f"{name} is tied to {twin}; its channels cannot go alone", remedy="Prune before tying."
                )


def narrow(block: Block, kept_K: Tensor, down_OK: Tensor) -> None:
    """Keep only some feed-forward channels.

    Args:
        block: its gate, up and down lose rows or columns; a shared basis is not touched.
        kept_K: ascending indices of the channels that stay.
        down_OK: the new weight of down.
    """
    maps = anatomy.projections(block)
    for role in ("gate", "up"):
        one = maps[role]
        own = one.coefficient if isinstance(one, SharedLinear) else one
        assert isinstance(own, nn.Linear)
        own.weight = nn.Parameter(own.weight.detach()[kept_K].contiguous())
        own.out_features = len(kept_K)
        if own.bias is not None:
            own.bias = nn.Parameter(own.bias.detach()[kept_K].contiguous())
    down = maps["down"]
    assert isinstance(down, nn.Linear)
    down.weight = nn.Parameter(down_OK.to(down.weight.dtype).contiguous())
    down.in_features = len(kept_K)


def drop_blocks(model: PreTrainedModel, dropped: list[int]) -> None:
    """Take blocks out; the rest is numbered anew, and per-block lists of the configuration follow."""
    layers = anatomy.decoder(model).get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    before = len(layers)
    kept = [index for index in range(before) if index not in dropped]
    config = model.config
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    remaining = nn.ModuleList(layers[index] for index in kept)
    anatomy.replace(model, layers, remaining)
    for index, block in enumerate(remaining):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
