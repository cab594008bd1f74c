"""A checkpoint as transformers alone opens it: no structure, no quantization of ours.

Shapes: O outputs, I inputs, V vocabulary, H hidden.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.anatomy.roles import biased
from stages.models.checkpoint import compressed_tensors, same_answers
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import QUANTIZATION, STRUCTURE, ZEROS, choose
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import quantized_linear, rounded_cache
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from stages.models.layers.sparse_linear import SparseLinear
from stages.runtime.contract import Progress, StageError


def write_plain(folder: Path, output: Path, progress: Progress) -> None:
    """Write a checkpoint so that `AutoModelForCausalLM.from_pretrained` opens it, with all that travels beside it.

    What needs nothing of ours is copied; quantized maps are written as compressed-tensors where that holds them, and
    as floats where it does not.

    Args:
        folder: a CHECKPOINT artifact.
        output: an empty folder.
        progress: told what is not as it was.

    Raises:
        StageError: the checkpoint does not open, or no plain model answers as it does.
    """
    ours = [name for name in (STRUCTURE, QUANTIZATION) if (folder / name).is_file()]
    if not ours:
        for name, path in choose(folder).files.items():
            if name != ZEROS:
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, output / name)
        return
    model = load_model(folder)
    if QUANTIZATION in ours and _compresses(folder, model, progress):
        save_model(model, output, like=folder, layout=compressed_tensors.METHOD, progress=progress)
        progress.note(
            "the quantized maps are stored as compressed-tensors, which transformers opens by the package of that name"
        )
    else:
        save_model(plain(model, progress), output, like=folder, progress=progress)


def _compresses(folder: Path, model: PreTrainedModel, progress: Progress) -> bool:
    modules = quantized_linear.quantized_modules(model)
    tables = [name for name, one in modules.items() if isinstance(one, QuantizedEmbedding)]
    try:
        compressed_tensors.refuse_inexpressible(model, modules, tables, read_json(folder / STRUCTURE, optional=True))
    except StageError as reason:
        progress.note(f"quantized weights are written as floats: {reason.what}")
        return False
    return bool(modules)


@torch.no_grad()
def plain(model: PreTrainedModel, progress: Progress) -> PreTrainedModel:
    """The same function as a model whose every map and table is a float tensor of the size that the configuration says.

    Args:
        model: from `load_model`; it rounds neither activations nor its cache afterwards.
        progress: told what is not as it was.

    Raises:
        StageError: no such model answers as this one does.
    """
    _leave_float(model, progress)
    made, padded = classes.empty(_configuration(model), torch.float32), 0
    if hasattr(made, "pooler") and model.pooler is None:
        made.pooler = None  # as it was left out of the model
    for name, to in anatomy.named_tensors(made):
        owner, _, attribute = name.rpartition(".")
        value = _value(model.get_submodule(owner), attribute)
        lacks = [most - size for most, size in zip(to.shape, value.shape, strict=True)]
        padded += any(lacks)
        if min(lacks, default=0) < 0:
            raise _unlike(f"{name} is {tuple(value.shape)}, its configuration says {tuple(to.shape)}")
        to.copy_(functional.pad(value.to(to.dtype), [side for lack in reversed(lacks) for side in (0, lack)]))
    if padded:
        progress.note(f"{padded} tensors of cut blocks are filled up with zeros to the one size that config.json knows")
    if model.can_generate():  # no other model has such settings
        made.generation_config = model.generation_config
    try:
        with rounded_cache.left_float(model):
            same_answers.check(model, made.eval(), {}, progress)
    except StageError as error:
        raise _unlike(error.measured) from error
    return made


def _leave_float(model: PreTrainedModel, progress: Progress) -> None:
    rounding = [one for one in model.modules() if isinstance(one, QuantizedLinear) and one.input_form is not None]
    for one in rounding:
        one.input_form = one.input_scale = None
    if rounding:
        progress.note(f"activations are rounded no more before {len(rounding)} maps")
    if caches := rounded_cache.modules(model):
        progress.note(f"keys and values are rounded no more in {len(caches)} layers")


def _configuration(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's own; its table serves the head no longer where the two were rounded apart."""
    config, head, table = deepcopy(model.config), model.get_output_embeddings(), model.get_input_embeddings()
    if config.tie_word_embeddings and head is not None and not torch.equal(_weight(head), _weight(table)):
        config.tie_word_embeddings = False
    return config


def _value(module: nn.Module, attribute: str) -> Tensor:
    if attribute == "weight":
        return _weight(module)
    if attribute == "bias" and isinstance(module, SharedLinear | ResidualLinear):
        return _bias(module)
    found = getattr(module, attribute)
    assert isinstance(found, Tensor)
    return found.detach()


def _weight(module: nn.Module) -> Tensor:
    """w_OI of a map of any kind, or w_VH of a table."""
    if isinstance(module, QuantizedLinear):
        return module.dequantized()
    if isinstance(module, QuantizedEmbedding):
        return module.weight.float() * module.weight_scale[:, None]
    if isinstance(module, SparseLinear):
        return module.dense().detach()
    if isinstance(module, SharedLinear):
        return _weight(module.coefficient) @ _weight(module.basis)
    if isinstance(module, ResidualLinear):
        return _weight(module.dense) + _weight(module.low)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _bias(module: nn.Module) -> Tensor:
    """The bias of a map that is made of parts: of those that have one."""
    if isinstance(module, SharedLinear | ResidualLinear):
        parts = (module.coefficient,) if isinstance(module, SharedLinear) else (module.dense, module.low)
        return torch.stack([_bias(one) for one in parts if biased(one)]).sum(0)
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias.detach()


def _unlike(measured: object) -> StageError:
    return StageError(
        "no plain checkpoint answers as this one does",
        measured=measured,
        limit="maps of the sizes that config.json says",
        remedy="Take --format onnx, or open the checkpoint by enginery.",
    )
