"""Peers' models as checkpoints that `fetch` reads. Tokenizers are the dense model's: whoever saves carries them over.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_E4M3_MOST = 448.0
"""The largest number of FP8."""


def compressed(model: Any, folder: Path) -> None:
    """llm-compressor's own way, in the layout of compressed-tensors; a model with zeros as it is."""
    model.save_pretrained(folder, save_compressed=True)


def modelopt_sparse(model: Any, folder: Path) -> None:
    """Model Optimizer's masks multiplied into the weights, in plain layers."""
    plain = importlib.import_module("modelopt.torch.sparsity").export(model)
    plain.tie_weights()  # which the export undoes; a head that is the table has no zeros
    plain.save_pretrained(folder)


def modelopt_fp8(model: Any, folder: Path) -> None:
    """Model Optimizer's FP8 weights and ranges in the layout of compressed-tensors: its own export is vLLM's alone.

    Its layers round weights and inputs to `e4m3(x / scale) * scale` with one scale of each, which is this format's.
    """
    quantized = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)
    }
    tensors = {name: one for name, one in model.state_dict().items() if "_quantizer" not in name}
    for name, module in quantized.items():
        scales = [one.amax.float().reshape(1) / _E4M3_MOST for one in (module.weight_quantizer, module.input_quantizer)]
        made = {"weight": _rounded(module.weight.detach(), scales[0]), "weight_scale": scales[0]}
        tensors |= {f"{name}.{key}": one for key, one in (made | {"input_scale": scales[1]}).items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    folder.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    fixed = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    group = {"targets": [*quantized], "weights": fixed, "input_activations": fixed}
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _rounded(w_OI: Tensor, scale: Tensor) -> Tensor:
    return (w_OI / scale).clamp(-_E4M3_MOST, _E4M3_MOST).to(torch.float8_e4m3fn)
