"""Blocks that go: what is left of each stack is numbered anew, and the configuration follows."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.runtime.contract import StageError

_DECODER_DEPTH = ("decoder_layers", "num_decoder_layers")
_NUMBERS = ("layer_idx", "layer_id")
"""What modules call their block's number, by which they find their keys and values."""


def drop_blocks(model: PreTrainedModel, dropped: Collection[int]) -> None:
    """Take blocks out of a model of any architecture.

    Args:
        model: with one or two stacks.
        dropped: indices as `anatomy.blocks` counts them.

    Raises:
        StageError: a stack would have none left, or its first block holds what the others read.
    """
    first = 0
    for path, layers in anatomy.stacks(model).items():
        before, config = len(layers), model.config
        kept = [place for place in range(before) if first + place not in dropped]
        first += before
        _check(path, layers, kept)
        depth = depth_field(model, path)
        for name, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == before and not config.is_encoder_decoder:
                setattr(config, name, [value[place] for place in kept])
        if hasattr(config, "attention_types"):  # GPT-Neo says its layers' kinds a second time, in runs
            config.attention_types = [[[kind], 1] for kind in config.attention_layers]
        setattr(config, depth, len(kept))
        remaining = nn.ModuleList(layers[place] for place in kept)
        anatomy.replace(model, layers, remaining)
        for place, block in enumerate(remaining):
            for module in block.modules():
                for name in _NUMBERS:
                    if isinstance(getattr(module, name, None), int):
                        setattr(module, name, place)


def depth_field(model: PreTrainedModel, path: str) -> str:
    """The field of the configuration that says how many blocks a stack has; BART's decoder alone has its own, too.

    Raises:
        StageError: none does.
    """
    names = _DECODER_DEPTH if "decoder" in path.split(".") else ()
    found = next((name for name in (*names, "num_hidden_layers") if hasattr(model.config, name)), None)
    if found is None:
        raise StageError(
            f"no field of the configuration of {type(model).__name__} says how many blocks {path} has",
            measured=model.config.model_type,
            limit=", ".join((*_DECODER_DEPTH, "num_hidden_layers")),
            remedy="Prune its weights: `method: magnitude`.",
        )
    return found


def _check(path: str, layers: nn.ModuleList, kept: list[int]) -> None:
    if not kept:
        raise StageError(f"{path} would have no block left", remedy="Drop fewer.")
    positions = any(getattr(one, "has_relative_attention_bias", False) for one in layers[0].modules())
    if positions and kept[0] != 0:
        raise StageError(f"{path}.0 holds the positions that all its blocks read", remedy="Keep that block.")
