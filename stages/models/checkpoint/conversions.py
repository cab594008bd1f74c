"""Between the tensors of a file and those of a model: by transformers' own conversion tables, both ways.

Shapes: E experts, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from stages.runtime.contract import StageError

_COMPUTED = (r"position_ids$", r"rotary|inv_freq|alibi", r"(^|[._])mask$|masked_bias$")
"""Names of tables that old checkpoints store and every model computes from its configuration."""


@dataclass(frozen=True)
class Matched:
    """What a file gives a model.

    Attributes:
        tensors: name in the model -> the tensor, of the shape that the architecture's module has.
        left: stored name -> the tensor, where the architecture has no place for it.
    """

    tensors: Mapping[str, Tensor]
    left: Mapping[str, Tensor]


def matched(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> Matched:
    """Each stored tensor under its name in the model; maps that the architecture holds as one are made one.

    Files may use the names of transformers' own conversion table. Checkpoints of a bare model lack the prefix that the
    same model bears under a head, and the other way round.

    Raises:
        StageError: two stored tensors are one of the model's, or parts of one are not alike.
    """
    known, place = model.state_dict(), _places(model)
    tensors: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    parts: dict[str, WeightConverter] = {}
    called: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):
        new, pattern, converter = place(name)
        if new not in known:
            left[name] = stored[name]
        elif converter is not None:
            # `setdefault` would copy the converter for each of its parts.
            if new not in parts:
                parts[new] = deepcopy(converter)
            parts[new].add_tensor(new, name, pattern, stored[name])
        elif called.setdefault(new, name) != name:
            raise StageError(
                f"{called[new]} and {name} are one tensor of {type(model).__name__}",
                measured=2,
                limit=1,
                remedy="Leave one of them out of the file.",
            )
        else:
            tensors[new] = stored[name]
    for new, converter in parts.items():
        tensors |= _made(model, new, converter)
    return Matched(tensors, left)


def named_as(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> name in the model; what has no place there keeps its own."""
    known, place = model.state_dict(), _places(model)
    found = {name: place(name)[0] for name in stored}
    return {name: new if new in known else name for name, new in found.items()}


def _places(model: PreTrainedModel) -> Any:
    """Of a stored name: the name in the model, and which converter makes it of which of its sources, if one does."""
    known, prefix = model.state_dict(), model.base_model_prefix
    table = get_model_conversion_mapping(model)
    renamings = [one for one in table if isinstance(one, WeightRenaming)]
    converters = [one for one in table if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}

    def place(name: str) -> tuple[str, str, WeightConverter | None]:
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known or (pattern is not None and name in known):
            plain, _ = rename_source_key(name, [], [], prefix, known)
            if plain in known:
                return plain, name, None
        return new, pattern or name, of_pattern.get(pattern)

    return place


def _made(model: PreTrainedModel, name: str, converter: WeightConverter) -> dict[str, Tensor]:
    for found in converter.collected_tensors.values():
        shapes = {tuple(one.shape) for one in found}
        if len(shapes) > 1 or len(found) != len(next(iter(converter.collected_tensors.values()))):
            raise StageError(
                f"the parts of {name} are not alike",
                measured=", ".join(f"{len(of)} {key}" for key, of in converter.collected_tensors.items()),
                limit="as many of each, of one shape",
                remedy="Fetch the checkpoint again: a file of it is damaged or of another model.",
            )
    made = converter.convert(name, model=model, config=model.config)
    return {key: one[0] if isinstance(one, list) else one for key, one in made.items()}


def learned(model: PreTrainedModel, left: Mapping[str, Tensor]) -> list[str]:
    """Of the stored tensors that the model has no place for, those that show that the file is of another architecture.

    Such a tensor was trained, and lies in a block or in a module that the model has: the bias of a map that has none
    there, a norm, one block too many. What lies elsewhere (a pooler, the head of another task, another stack) is what
    transformers leaves out, too. Not trained are whole numbers, single ones that scale nothing, the masks and tables of
    sines of old files (their first length is 1), and what transformers' classes themselves say that they ignore.
    """
    place, base = _places(model), f"{model.base_model_prefix}."
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_COMPUTED]
    blocks = [f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    owners = {path for path, module in model.named_modules() if module._parameters}
    found = []
    for name, tensor in left.items():
        new = place(name)[0]
        names = (name, new, base + new, new.removeprefix(base))
        single = tensor.numel() == 1 and "scale" not in name
        table = not tensor.is_floating_point() or single or (tensor.dim() > 2 and tensor.shape[0] == 1)
        if table or any(re.search(pattern, one) for pattern in ignored for one in names):
            continue
        inside = any(one.startswith(block) and one[len(block)].isdigit() for one in names for block in blocks)
        if inside or any(one.rpartition(".")[0] in owners for one in names):
            found.append(name)
    return found


def file_tensors(
    model: PreTrainedModel, reference: PreTrainedModel, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors as files of this architecture hold them: the inverse of `matched`.

    Args:
        model: whose tensors they are.
        reference: what transformers makes of its configuration. What is not as there (a quantized or thin map) is kept
            as it is and only renamed.
        tensors: name in the model -> tensor, as its module holds it.
    """
    table = [one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)]
    back = [one.reverse_transform() for one in reversed(table)]
    renamings = [one for one in back if isinstance(one, WeightRenaming)]
    parts = _reversible(reference, [one for one in back if isinstance(one, WeightConverter)], tensors)
    used = {name for converter in parts.values() for of in converter.layer_targets.values() for name in of}
    made = {apply_renamings(name, renamings): one for name, one in tensors.items() if name not in used}
    for new, converter in parts.items():
        for name, one in converter.convert(new, model=model, config=model.config).items():
            made[apply_renamings(name, renamings)] = one[0] if isinstance(one, list) else one
    return made


def _reversible(
    reference: PreTrainedModel, converters: list[WeightConverter], tensors: Mapping[str, Tensor]
) -> dict[str, WeightConverter]:
    """First name in the file -> the converter with its tensors, where all of them are as the architecture has them."""
    plain = reference.state_dict()
    parts: dict[str, WeightConverter] = {}
    for name in sorted(plain, key=dot_natural_key):
        for converter in converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                if new not in parts:
                    parts[new] = deepcopy(converter)
                parts[new].add_tensor(new, name, pattern, tensors.get(name))
                break
    return {new: one for new, one in parts.items() if _whole(one, plain, tensors)}


def _whole(converter: WeightConverter, plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    names = [name for of in converter.layer_targets.values() for name in of]
    as_there = (
        name in tensors and tensors[name].is_floating_point() and tensors[name].shape == plain[name].shape
        for name in names
    )
    return len(converter.collected_tensors) == len(converter.source_patterns) and all(as_there)
