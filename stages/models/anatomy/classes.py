"""Which class a configuration stands for, and what of it a file lays out in its own way. Remote code is never trusted.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
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
    AutoModelForMultipleChoice,
    AutoModel,
)
"""transformers' own tables of architectures, by what they answer."""
_ROWS = 2
"""Dimensions of token ids."""
_MANNERS = (
    "auto_map", "torchscript", "return_dict", "use_return_dict", "output_attentions",
    "output_hidden_states", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "quantization_config",
)  # fmt: skip
"""Fields that say how somebody ran or stored a model: none of what it is, and some fail where that is not installed."""
_NONSENSE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)
"""What transformers raises of a configuration that it makes no model of."""


def configuration(read: Mapping[str, Any], where: str, *, bare: bool = False) -> PreTrainedConfig:
    """The configuration that config.json holds.

    Args:
        read: config.json.
        where: it stands.
        bare: the model is asked for its tokens' vectors, so that a head plays no part.

    Raises:
        StageError: its architecture is not understood, transformers takes no such values, or another tool quantized
            the checkpoint.
    """
    kind = str(read.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        own = ": it comes with code of its own (auto_map), which is never run" if read.get("auto_map") else ""
        raise StageError(
            f"the architecture {kind!r} of {where} is not understood{own}",
            limit="the model types that transformers itself knows",
            remedy="Give a checkpoint of one of these types.",
        )
    if read.get("quantization_config"):
        raise StageError(
            f"{where} is quantized by {read['quantization_config'].get('quant_method', 'another tool')}",
            remedy="Give the checkpoint it was made from.",
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(_bare(PreTrainedConfig._decode_special_floats(read)))
    except Exception as error:  # of a value that its checks refuse it raises classes of its own
        raise _refused(where, error, read) from error
    config.architectures = [_native(config, read, where)]
    found = AutoModel._model_mapping.get(type(config), ()) if bare else ()
    headless = [one.__name__ for one in (found if isinstance(found, tuple) else (found,))]
    if not {*headless} & {*config.architectures}:
        config.architectures = headless[:1] or config.architectures
    return config


def _bare(read: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without _MANNERS, those of the parts that it is made of included."""
    kept = {name: one for name, one in read.items() if name not in _MANNERS}
    return {
        name: _bare(one) if name.endswith("_config") and isinstance(one, dict) else one for name, one in kept.items()
    }


def _refused(where: str, error: Exception, read: Mapping[str, Any]) -> StageError:
    said = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    if isinstance(error, LookupError):  # of a table of transformers: whose key it is says the field
        fields = {name: [*one.values()] if isinstance(one, dict) else [one] for name, one in read.items()}
        said = "; ".join(f"{name}: {key!r}" for key in error.args for name, of in fields.items() if key in of) or said
    return StageError(
        f"transformers makes no model of {where}",
        measured=said,
        remedy="Correct that field, or save the checkpoint again by the transformers that it was made with.",
    )


def _native(config: PreTrainedConfig, read: Mapping[str, Any], where: str) -> str:
    """The class that `architectures` names, or, where that one is code of the checkpoint's own, what stands for it."""
    told = read.get("architectures") or [""]
    named = told if isinstance(told, str) else told[0]
    known = [one.__name__ for one in known_classes(config)]
    # auto_map says for which task the class of its own is: transformers has a class for that task, too.
    own = {str(of).rpartition(".")[2]: task for task, of in (read.get("auto_map") or {}).items()}
    for task in TASKS:
        if named not in known and own.get(named) == task.__name__:
            found = task._model_mapping.get(type(config), ())
            named = next((one.__name__ for one in (found if isinstance(found, tuple) else (found,))), named)
    if named not in known:
        raise StageError(
            f"{where} names the architecture {named!r}, which is not understood for {config.model_type!r}",
            limit=", ".join(known) or "none",
            remedy=f'Set "architectures" in {where} to the class of the checkpoint.',
        )
    return named


def known_classes(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes that transformers' own tables have for a model type, each once."""
    seen = set()
    for task in TASKS:
        found = task._model_mapping.get(type(config), ())
        for one in found if isinstance(found, tuple) else (found,):
            if one.__name__ not in seen:
                seen.add(one.__name__)
                yield one


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names, see `configuration`."""
    named = (config.architectures or [""])[0]
    return next(one for one in known_classes(config) if one.__name__ == named)


def empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the configuration whose linear maps are all nn.Linear; its parameters hold no values yet.

    Raises:
        StageError: transformers makes none: an unknown way to turn positions, an unknown activation, sizes at odds.
    """
    with no_init_weights():
        try:
            model: PreTrainedModel = model_class(config)._from_config(config, dtype=dtype)
        except _NONSENSE as error:
            raise _refused(f"this configuration of {config.model_type!r}", error, config.to_dict()) from error
        model.tie_weights()
        _one_choice_a_row(model)
        for path, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                inputs, outputs = module.weight.shape
                model.set_submodule(path, nn.Linear(inputs, outputs, dtype=dtype))
    return model


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """What transformers makes of the model's configuration, without memory (on the meta device)."""
    return outline(type(model), model.config)


def outline(one: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A class's model of a configuration, without memory (on the meta device); the configuration is not touched."""
    # On the meta device torch computes some tables by functions that are marked for its compiler.
    with without_compiler(), torch.device("meta"), no_init_weights():
        made = one(type(config).from_dict(config.to_dict()))
        made.tie_weights()
        _one_choice_a_row(made)
    return made


def _one_choice_a_row(model: PreTrainedModel) -> None:
    """Let a model that chooses read rows, [N, T], as all others do: each is the only choice of a question of its own.

    Its score does not depend on the other choices, which meet in the loss alone.
    """
    if type(model) is AutoModelForMultipleChoice._model_mapping.get(type(model.config), None):
        model.register_forward_pre_hook(_apart, with_kwargs=True)


def _apart(_model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # By the ids a model counts the choices, and flattens whatever else it is told: but DistilBERT not its positions.
    ids = given.get("input_ids")
    return args, given | {"input_ids": ids[:, None]} if isinstance(ids, Tensor) and ids.ndim == _ROWS else given


def transposed(model: PreTrainedModel, reference: PreTrainedModel) -> set[str]:
    """Names of the weights that a file holds as [I, O] because the architecture makes its maps of Conv1D.

    A map that surgery put in its place is stored as itself.
    """
    places = [path for path, module in reference.named_modules() if isinstance(module, Conv1D)]
    modules = dict(model.named_modules(remove_duplicate=False))
    return {f"{path}.weight" for path in places if isinstance(modules.get(path), nn.Linear)}


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
