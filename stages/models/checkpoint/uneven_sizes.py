"""Maps and heads that surgery left smaller than the configuration says, block by block, as `structure.json` tells them.

A configuration has one width for all blocks. Where blocks differ, `sizes` names each module and each whole number of it
that differs: {"model.layers.3.mlp.up_proj": {"out_features": 100}, "model.layers.3.self_attn": {"num_heads": 3}}.
A map that gained or lost its bias says so: {"bias": true}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.roles import biased, is_map
from stages.runtime.contract import StageError

Sizes = dict[str, dict[str, int | bool]]
_POSITION = "layer_idx"


def describe(model: PreTrainedModel, reference: PreTrainedModel) -> Sizes:
    """Whole numbers of the blocks' modules that differ from those of a model of the same configuration."""
    found: Sizes = {}
    dense = dict(reference.named_modules())
    for block in anatomy.blocks(model):
        for inner, module in block.module.named_modules(remove_duplicate=False):
            path = f"{block.name}.{inner}" if inner else block.name
            if path in dense and (differs := _differences(_numbers(module), _numbers(dense[path]))):
                found[path] = differs
    return found


def install(model: PreTrainedModel, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the modules of a dense model the sizes that `describe` told; resized maps hold no values yet.

    Raises:
        StageError: a module or a number is not there.
    """
    for path, numbers in sizes.items():
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise StageError(f"structure.json sizes {path}, which the model does not have") from error
        known = _numbers(module)
        for name, value in numbers.items():
            if name not in known or not isinstance(value, int) or value < 0:
                raise StageError(f"structure.json gives {path} a {name} that it cannot have", measured=value)
        if isinstance(module, nn.Linear):
            changed = {**known, **numbers}
            like = {"dtype": module.weight.dtype, "bias": bool(changed["bias"])}
            made = nn.utils.skip_init(nn.Linear, changed["in_features"], changed["out_features"], **like)
            model.set_submodule(path, made)
        else:
            for name, value in numbers.items():
                setattr(module, name, value)


def _differences(mine: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int | bool]:
    return {name: value for name, value in mine.items() if name in theirs and theirs[name] != value}


def _numbers(module: nn.Module) -> dict[str, int]:
    if isinstance(module, Conv1D):
        return {"in_features": module.nx, "out_features": module.nf, "bias": True}
    if is_map(module):
        inputs, outputs = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        return {"in_features": inputs, "out_features": outputs, "bias": biased(module)}
    return {name: value for name, value in vars(module).items() if _counts(name, value)}


def _counts(name: str, value: Any) -> bool:
    return type(value) is int and name != _POSITION and not name.startswith("_")
