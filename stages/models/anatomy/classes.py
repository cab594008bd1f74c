"""Which class a configuration stands for, and what of it a file lays out in its own way. Remote code is never trusted.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from stages.models.memory.lean_import import without_compiler
from stages.runtime.contract import StageError

TASKS = (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModel,
)
"""transformers' own tables of architectures, by what they answer."""

_DERIVED = r"(rotary_emb\.inv_freq|embeddings\.position_ids)$"
"""Tables that old checkpoints store and every model computes from its configuration."""


def configuration(read: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The configuration that config.json holds.

    Raises:
        StageError: its architecture is not understood, or another tool quantized the checkpoint.
    """
    kind = str(read.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise StageError(
            f"the architecture {kind!r} is not understood",
            limit="the model types that transformers itself knows",
            remedy="Give a checkpoint of one of these types.",
        )
    if "quantization_config" in read:
        raise StageError(
            f"{where} is quantized by {read['quantization_config'].get('quant_method', 'another tool')}",
            remedy="Give the checkpoint it was made from.",
        )
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(dict(read))
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names, from transformers' own tables.

    Raises:
        StageError: it names none, or one that stands in none of TASKS for this model type.
    """
    named, known = (config.architectures or [""])[0], []
    for task in TASKS:
        found = task._model_mapping.get(type(config), ())
        for one in found if isinstance(found, tuple) else (found,):
            known.append(one.__name__)
            if one.__name__ == named:
                chosen: type[PreTrainedModel] = one
                return chosen
    raise StageError(
        f"config.json names the architecture {named!r}, which is not understood for {config.model_type!r}",
        limit=", ".join(dict.fromkeys(known)) or "none",
        remedy='Set "architectures" in config.json to the class of the checkpoint.',
    )


def empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the configuration whose linear maps are all nn.Linear; its parameters hold no values yet."""
    with no_init_weights():
        model = model_class(config)._from_config(config, dtype=dtype)
        model.tie_weights()
        for path, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                inputs, outputs = module.weight.shape
                model.set_submodule(path, nn.Linear(inputs, outputs, dtype=dtype))
    return model


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """What transformers makes of the model's configuration, without memory (on the meta device)."""
    # On the meta device torch computes some tables by functions that are marked for its compiler.
    with without_compiler(), torch.device("meta"), no_init_weights():
        made: PreTrainedModel = type(model)(type(model.config).from_dict(model.config.to_dict()))
    return made


def transposed(model: PreTrainedModel, reference: PreTrainedModel) -> set[str]:
    """Names of the weights that a file holds as [I, O] because the architecture makes its maps of Conv1D.

    A map that surgery put in its place is stored as itself.
    """
    places = [path for path, module in reference.named_modules() if isinstance(module, Conv1D)]
    modules = dict(model.named_modules(remove_duplicate=False))
    return {f"{path}.weight" for path in places if isinstance(modules.get(path), nn.Linear)}


def named_as(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> name in the model, without the tables that the model computes itself.

    Files may use the names of transformers' own conversion table. Checkpoints of a bare model lack the prefix that the
    same model bears under a head.
    """
    names, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    computed = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), _DERIVED]
    found: dict[str, str] = {}
    for name in stored:
        new = name if name in names else _renamed(name, renamings)
        if new not in names and prefix + new in names:
            new = prefix + new
        if new in names or not any(re.search(pattern, name) for pattern in computed):
            found[name] = new
    return found


def file_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in the model -> the name that files of this architecture use."""
    table = [one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightRenaming)]
    back = [one.reverse_transform() for one in reversed(table) if not isinstance(one, PrefixChange)]
    return {name: _renamed(name, back) for name in names}


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for one in renamings:
        name = one.rename_source_key(name)[0]
    return name


def computed(model: PreTrainedModel, name: str) -> Tensor | None:
    """The tensor of a name that files may leave out since it follows from the configuration; None for any other.

    Such are a table of sines, which its module makes, and an output bias that is zero until it was trained.
    """
    allowed = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    if not any(re.search(pattern, name) for pattern in allowed):
        return None
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if hasattr(module, "create_weight"):
        made: Tensor = module.create_weight()
        return made
    return module._buffers.get(attribute)


def left_out(model: PreTrainedModel, name: str, tensor: Tensor) -> bool:
    """Whether files of this architecture leave the tensor out and it is what the configuration says."""
    made = computed(model, name) if name in (getattr(model, "_keys_to_ignore_on_save", None) or ()) else None
    return made is not None and torch.equal(made, tensor)
