"""The one loader and the one saver of checkpoints. Tensors come from safetensors; no file can bring code along."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from stages.models import anatomy, quantized, shared
from stages.runtime.contract import StageError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
STRUCTURE, QUANTIZATION, GENERATION = "structure.json", "quantization.json", "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_DERIVED = "rotary_emb.inv_freq"
"""A table that old checkpoints store and every model computes from its configuration."""


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint as a model in eval mode, with its surgery and its quantized layers.

    The files are mapped, not copied: at `dtype` equal to the stored one, a weight takes memory when it is read. Nothing
    that the model does to its weights reaches the file.

    Args:
        folder: a CHECKPOINT artifact, or any folder in Hugging Face layout.
        dtype: of the parameters; quantized layers keep their stored types.

    Raises:
        StageError: a file is missing, cut short or a pickle, the architecture is not understood, tensors are missing,
            left over, misshapen or not finite.
    """
    config = load_config(folder)
    stored = _tensors(folder)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if config.tie_word_embeddings:
            model.tie_weights()
        if structure := _json(folder / STRUCTURE, optional=True):
            shared.install(model, structure)
        if quantization := _json(folder / QUANTIZATION, optional=True):
            quantized.install(model, quantization)
    _fill(model, stored, dtype)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_dict(_json(folder / GENERATION))
    return model.eval()


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        StageError: it is missing, no JSON, of an architecture that is not understood, or of a foreign quantization.
    """
    read = _json(folder / CONFIG)
    anatomy.check_type(str(read.get("model_type", "")))
    if "quantization_config" in read:
        raise StageError(
            f"{folder.name} is quantized by {read['quantization_config'].get('quant_method', 'another tool')}",
            remedy="Give the checkpoint it was made from.",
        )
    config: PreTrainedConfig = CONFIG_MAPPING[read["model_type"]].from_dict(read)
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


def save_model(model: PreTrainedModel, folder: Path, *, like: Path) -> None:
    """Write a checkpoint: weights, configuration, structure, quantization; the same model gives the same bytes.

    Args:
        model: as from `load_model`; each distinct tensor is stored once.
        folder: where to; made if absent.
        like: the checkpoint whose tokenizer and generation files are copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    once = {names[0]: tensor for names, tensor in _distinct(model)}
    save_file({name: tensor.detach().contiguous() for name, tensor in once.items()}, folder / WEIGHTS, {"format": "pt"})
    config = model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    _write_json(folder / CONFIG, config)
    for name, spec in ((STRUCTURE, shared.describe(model)), (QUANTIZATION, quantized.describe(model))):
        if spec:
            _write_json(folder / name, spec)
    for name in (*TOKENIZER, GENERATION):
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)


def stored_parameters(folder: Path) -> int:
    """Numbers that a float checkpoint stores, read from the headers alone."""
    count = 0
    for file in _weight_files(folder):
        with _opened(file) as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())
    return count


def _distinct(model: PreTrainedModel) -> Iterator[tuple[list[str], Tensor]]:
    # state_dict keeps insertion order, so that the first name is the same in every process.
    named: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in anatomy.named_tensors(model):
        named.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from named.values()


def _fill(model: PreTrainedModel, stored: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put every stored tensor in its place, and assert that none is missing and none is left over."""
    new: dict[int, Tensor] = {}
    missing: list[str] = []
    for names, old in list(_distinct(model)):
        found = [stored.pop(name) for name in names if name in stored]
        if not found:
            missing.append(names[0])
            continue
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise StageError(
                f"{' and '.join(names)} are tied by the configuration but differ in the file",
                remedy='Set "tie_word_embeddings": false in config.json.',
            )
        if found[0].shape != old.shape:
            raise StageError(f"{names[0]} is misshapen", measured=tuple(found[0].shape), limit=tuple(old.shape))
        new[id(old)] = _as(found[0], old, dtype, names[0])
    left = sorted(stored)
    if missing or left:
        raise StageError(
            "weights and configuration do not belong together",
            measured=f"{len(missing)} missing {missing[:3]}, {len(left)} unexpected {left[:3]}",
            limit="0 missing, 0 unexpected",
        )
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own |= {name: new[id(old)] for name, old in own.items() if id(old) in new}


def _as(found: Tensor, old: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if found.is_floating_point() and not torch.stack(torch.aminmax(found)).isfinite().all():
        raise StageError(f"{name} holds a NaN or an infinity", remedy="Give a checkpoint whose weights are finite.")
    if isinstance(old, nn.Parameter):
        return nn.Parameter(found.to(dtype))
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with _opened(file) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_DERIVED)}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise StageError(
            f"{file.name} is damaged or cut short",
            measured=f"{file.stat().st_size} bytes, {error}",
            remedy="Fetch the checkpoint again.",
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise StageError(f"{INDEX} names a file outside the checkpoint")
        files = [folder / name for name in names]
        if lost := [file.name for file in files if not file.is_file()]:
            raise StageError(f"{folder.name} lacks {lost[0]}", measured=f"{len(lost)} of {len(files)} shards missing")
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise StageError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded",
            limit=WEIGHTS,
            remedy="Convert it where you trust it: model.save_pretrained(folder, safe_serialization=True).",
        )
    raise StageError(f"{folder.name} has no {WEIGHTS}", remedy="Give a checkpoint in Hugging Face layout.")


def _json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(
            f"{path.parent.name} has no {path.name}", remedy="Give a checkpoint in Hugging Face layout."
        ) from error
    except ValueError as error:
        raise StageError(f"{path.name} is not JSON", measured=str(error)) from error
    if not isinstance(read, dict):
        raise StageError(f"{path.name} is no JSON object", measured=type(read).__name__)
    return read


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
