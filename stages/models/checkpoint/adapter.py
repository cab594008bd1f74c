"""A LoRA that peft trained, merged into the model it was trained on.

Shapes: O outputs, I inputs, r rank, V vocabulary, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.checkpoint import files
from stages.models.checkpoint.hub_folders import ADAPTER, ADAPTER_WEIGHTS
from stages.models.checkpoint.json_files import read_json
from stages.models.checkpoint.layout import CONFIG, QUANTIZATION
from stages.models.layers import quantization_spec
from stages.models.memory.saved_state import settle
from stages.runtime.contract import Progress, StageError

_PREFIX = "base_model.model."
_BEGUN_AS_IT_IS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA that leave the base as it is; others (pissa, olora, corda, loftq) take away from it."""
_UNKNOWN = ("use_qalora", "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config",
            "alora_invocation_tokens", "arrow_config")  # fmt: skip


def merge(model: PreTrainedModel, base: Path, folder: Path, spare: Path | None, progress: Progress) -> None:
    """Merge a LoRA into a model, in place; what changes lies in files below `spare` from then on.

    As peft computes it: W + scale B A with scale = alpha / r, or alpha / sqrt(r) (rslora); with DoRA each row of that
    is brought to its trained length. What was trained whole (`modules_to_save`, biases) takes its place. Where what
    changes was one tensor with another, they are two from then on.

    Args:
        model: the base, its linear maps [O, I]; on the meta device it is looked at whether and how the adapter fits.
        base: its folder.
        folder: with adapter_model.safetensors and adapter_config.json.
        spare: for the changed weights; None on the meta device, which has none.
        progress: told what is untied.

    Raises:
        StageError: the base is quantized, another technique or variant, or tensors that have no place in the model.
    """
    read, config = read_json(base / CONFIG), read_json(folder / ADAPTER)
    if read.get("quantization_config") or quantization_spec.describe(model) is not None:
        raise StageError(
            f"{base} is quantized, and an adapter is merged into floats",
            measured=read.get("quantization_config", {}).get("quant_method", QUANTIZATION),
            remedy="Set `base` to the float checkpoint that it was made from.",
        )
    _check(config, folder)
    tensors = files.read_files([folder / ADAPTER_WEIGHTS])
    parts = _by_module({name: tensor.to(model.device) for name, tensor in tensors.items()}, folder)
    for done, (path, found) in enumerate(sorted(parts.items()), 1):
        try:
            module = model.get_submodule(path)
            changed = _merged(module, path, found, config)
        except (AttributeError, RuntimeError, KeyError) as error:
            raise StageError(
                f"the adapter {folder} does not fit its base",
                measured=f"{path}: {str(error).splitlines()[0]}",
                limit=f"a module of {type(model).__name__} that takes {', '.join(sorted(found))}",
                remedy="Set `base` to the checkpoint on which it was trained.",
            ) from error
        for name, tensor in changed.items():
            made = nn.Parameter(tensor.to(module.get_parameter(name).dtype).contiguous())
            if spare is not None:
                settle(spare / f"{done}.{name}.safetensors", [made])
            _put(model, module, name, made, progress)
        progress.advanced(done, len(parts))
    _resized(model)


def _check(config: Mapping[str, Any], folder: Path) -> None:
    odd = [f"{name} {config[name]}" for name in _UNKNOWN if config.get(name)]
    begun = config.get("init_lora_weights", True)
    odd += [] if begun in _BEGUN_AS_IT_IS else [f"init_lora_weights {begun}"]
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA" or odd:
        raise StageError(
            f"{folder / ADAPTER} describes an adapter that is not merged here",
            measured=", ".join(odd) or kind or "no peft_type",
            limit="LORA (rank and alpha patterns, rslora, DoRA, tables, modules_to_save)",
            remedy="Merge it where you trust it: model.merge_and_unload().save_pretrained(...), and give that.",
        )


def _by_module(stored: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Path of a module in the model -> what the adapter has for it: lora_A.weight, ..., or a parameter's own name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        if not name.startswith(_PREFIX):
            raise StageError(
                f"{folder / ADAPTER_WEIGHTS} holds a tensor that is none of an adapter",
                measured=name,
                limit=f"names that begin with {_PREFIX}",
                remedy="Write it again: model.save_pretrained(folder).",
            )
        plain = re.sub(r"\.(base_layer|modules_to_save)\.", ".", name.removeprefix(_PREFIX)).replace(".default", "")
        at = re.search(r"\.lora_\w+", plain)
        path, key = (plain[: at.start()], plain[at.start() + 1 :]) if at else plain.rpartition(".")[::2]
        parts.setdefault(path, {})[key] = tensor
    return parts


@torch.no_grad()
def _merged(module: nn.Module, path: str, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name -> the new values of a module's parameters, in float32 where they were computed."""
    made = {key: tensor for key, tensor in found.items() if not key.startswith("lora_")}
    for key in made:
        if made[key].shape[1:] != module.get_parameter(key).shape[1:]:
            raise RuntimeError(f"{key} is {tuple(made[key].shape)}, not {tuple(module.get_parameter(key).shape)}")
    if "lora_embedding_A" in found:
        delta_VH = (found["lora_embedding_B"].float() @ found["lora_embedding_A"].float()).t()
        rank = len(found["lora_embedding_A"])
        made["weight"] = module.get_parameter("weight").float() + _scale(path, rank, config) * delta_VH
    elif "lora_A.weight" in found:
        rank = len(found["lora_A.weight"])
        scale = _scale(path, rank, config)
        # `fan_in_fan_out` says how the base's file lays a map out; the model's maps are [O, I] whatever it says.
        delta_OI = found["lora_B.weight"].float() @ found["lora_A.weight"].float()
        w_OI = module.get_parameter("weight").float() + scale * delta_OI
        length = found.get("lora_magnitude_vector", found.get("lora_magnitude_vector.weight"))
        if length is not None:
            w_OI *= (length.float() / w_OI.norm(dim=1))[:, None]
        made["weight"] = w_OI
        if "lora_B.bias" in found:
            made["bias"] = module.get_parameter("bias").float() + scale * found["lora_B.bias"].float()
    return made


def _scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", path)]
    alpha = float(own[0] if own else config.get("lora_alpha", 8))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _put(model: PreTrainedModel, module: nn.Module, name: str, new: nn.Parameter, progress: Progress) -> None:
    """Give a module its new parameter. What was one tensor with it keeps the old one, unless that has fewer rows."""
    old = module.get_parameter(name)
    places = [(path, one) for path, one in model.named_modules() if getattr(one, name, None) is old]
    grown = len(new) != len(old)
    for _, one in places if grown else [("", module)]:
        setattr(one, name, new)
    if len(places) > 1 and not grown:
        paths = " and ".join(path for path, _ in places)
        progress.note(f"{paths} were one tensor, of which the adapter changes one alone: they are two")
        model.config.tie_word_embeddings = False


def _resized(model: PreTrainedModel) -> None:
    """A table that was trained with more rows gives the vocabulary its size."""
    table = model.get_input_embeddings()
    rows = len(table.get_parameter("weight"))
    if rows != model.config.vocab_size:
        table.num_embeddings = model.config.vocab_size = rows
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.out_features = len(head.weight)
