"""The one loader and the one saver of checkpoints. Tensors come from safetensors; no file can bring code along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.checkpoint import compressed_tensors, files, uneven_sizes
from stages.models.checkpoint.json_files import read_json, write_json
from stages.models.checkpoint.layout import CONFIG, GENERATION, QUANTIZATION, STRUCTURE, TOKENIZER_FILES, WEIGHTS, carry
from stages.models.layers import low_rank_linear, quantization_spec, rounded_cache, sparse_linear
from stages.models.memory import pages
from stages.runtime.contract import StageError


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint as a model in eval mode, with its surgery and its quantized layers.

    The class is the one that the configuration names. The files are mapped, not copied: at `dtype` equal to the stored
    one, a weight takes memory when it is read, and `pages.release` gives it back. Nothing that the model does to its
    weights reaches the file. Every linear map is an nn.Linear, whatever way its architecture lays the file out.

    Args:
        folder: a CHECKPOINT artifact, or any folder in Hugging Face layout; compressed-tensors is understood.
        dtype: of the parameters; quantized layers keep their stored types.

    Raises:
        StageError: a file is missing, cut short or a pickle, the architecture is not understood, tensors are missing,
            left over, misshapen or not finite.
    """
    read = read_json(folder / CONFIG)
    foreign = read.get("quantization_config", {})
    compressed = read.pop("quantization_config") if foreign.get("quant_method") == compressed_tensors.METHOD else None
    config = classes.configuration(read, folder.name)
    stored = files.read(folder)
    model = classes.empty(config, dtype)
    with no_init_weights():
        if structure := read_json(folder / STRUCTURE, optional=True):
            with _following(STRUCTURE):
                uneven_sizes.install(model, structure.get("sizes", {}))
                low_rank_linear.install(model, structure)
        if quantization := read_json(folder / QUANTIZATION, optional=True):
            with _following(QUANTIZATION):
                quantization_spec.install(model, quantization)
                if "kv_cache" in quantization:
                    rounded_cache.install(model, quantization["kv_cache"])
        elif compressed:
            stored = compressed_tensors.install(model, compressed, stored)
    _fill(model, stored, dtype)
    sparse_linear.check(model)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION))
    return model.eval()


@contextmanager
def _following(name: str) -> Iterator[None]:
    """Raise StageError naming the file where a description cannot be followed: a field is missing, or is nonsense."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # no RuntimeError: memory that ran out is one
        raise StageError(
            f"{name} cannot be followed: it is damaged, or of another model",
            measured=f"{type(error).__name__}: {error}",
            remedy="Make the checkpoint again, or put the file back that was written with it.",
        ) from error


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint that is float or quantized by us.

    Raises:
        StageError: it is missing, no JSON, of an architecture that is not understood, or of a foreign quantization.
    """
    config = classes.configuration(read_json(folder / CONFIG), folder.name)
    classes.model_class(config)
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        StageError: the folder has none, or only one that brings code along.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{folder.name} has no tokenizer that can be read",
            measured=str(error).splitlines()[0],
            remedy="Put tokenizer.json and tokenizer_config.json beside the weights.",
        ) from error
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path, *, like: Path, layout: str = "enginery") -> None:
    """Write a checkpoint: weights, configuration, structure, quantization; the same model gives the same bytes.

    Weights are written one by one. Those that are still views of a mapped file are given back to it.

    Args:
        model: as from `load_model`; each distinct tensor is stored once.
        folder: where to; made if absent.
        like: the checkpoint whose tokenizer and generation files are copied.
        layout: `compressed-tensors` writes quantized layers as other engines read them.

    Raises:
        StageError: the layout cannot hold the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reference = classes.plain(model)
    config, structure = _configured(model), _structure(model, reference)
    quantization = quantization_spec.describe(model)
    turned = classes.transposed(model, reference)
    once = {names[0]: tensor.detach() for names, tensor in _distinct(model)}
    once = {name: tensor for name, tensor in once.items() if not classes.left_out(model, name, tensor)}
    if layout == compressed_tensors.METHOD:
        once, config["quantization_config"] = compressed_tensors.write(model, once, structure)
        quantization = None
    called = classes.file_names(model, once)
    files.write(folder / WEIGHTS, {called[name]: w.t() if name in turned else w for name, w in once.items()})
    for name, spec in ((CONFIG, config), (STRUCTURE, structure), (QUANTIZATION, quantization)):
        if spec:
            write_json(folder / name, spec)
    carry(like, folder, (*TOKENIZER_FILES, GENERATION))


def _configured(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    return config | {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}


def _structure(model: PreTrainedModel, reference: PreTrainedModel) -> dict[str, Any]:
    structure = low_rank_linear.describe(model) or {}
    resized = uneven_sizes.describe(model, reference)
    return structure | ({"sizes": resized} if resized else {})


def _distinct(model: PreTrainedModel) -> Iterator[tuple[list[str], Tensor]]:
    # state_dict keeps insertion order, so that the first name is the same in every process.
    named: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in anatomy.named_tensors(model):
        named.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from named.values()


def _fill(model: PreTrainedModel, found: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put every stored tensor in its place, and assert that none is missing and none is left over."""
    stored = {new: found[old] for old, new in classes.named_as(model, found).items()}
    turned = classes.transposed(model, classes.plain(model))
    new: dict[int, Tensor] = {}
    missing: list[str] = []
    for names, old in list(_distinct(model)):
        one = _one(names, [stored.pop(name) for name in names if name in stored])
        if one is None:
            one = classes.computed(model, names[0])
        if one is None:
            missing.append(names[0])
            continue
        if names[0] in turned and one.dim() == 2:
            one = one.t()
        if one.shape != old.shape:
            raise StageError(f"{names[0]} is misshapen", measured=tuple(one.shape), limit=tuple(old.shape))
        new[id(old)] = _as(one, old, dtype, names[0])
    if missing or stored:
        left = sorted(stored)
        raise StageError(
            "weights and configuration do not belong together",
            measured=f"{len(missing)} missing {missing[:3]}, {len(left)} unexpected {left[:3]}",
            limit="0 missing, 0 unexpected",
            remedy="Save it by the class it is used as: AutoModelFor...from_pretrained(...).save_pretrained(...).",
        )
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own |= {name: new[id(old)] for name, old in own.items() if id(old) in new}


def _one(names: list[str], found: list[Tensor]) -> Tensor | None:
    """The tensor that stands under one or several names, None where it stands under none."""
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise StageError(
            f"{' and '.join(names)} are tied by the configuration but differ in the file",
            remedy='Set "tie_word_embeddings": false in config.json.',
        )
    return found[0] if found else None


def _as(found: Tensor, old: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if found.is_floating_point() and found.numel():
        # A NaN or an infinity shows in the extremes; float8 has no kernel for them.
        wide = found.float() if found.element_size() == 1 else found
        if not torch.stack(torch.aminmax(wide)).isfinite().all():
            raise StageError(f"{name} holds a NaN or an infinity", remedy="Give a checkpoint whose weights are finite.")
    made: Tensor = nn.Parameter(found.to(dtype).contiguous()) if isinstance(old, nn.Parameter) else found
    pages.forget(found)
    return made
