"""Published tools on the same model and the same windows, where they are installed.

A peer quantizes or prunes a model in memory and leaves it there: activations are rounded as it runs, so that it is
scored in the process that made it. Neither tool is a dependency of ours; each may live in an interpreter of its own.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Apply = Callable[[nn.Module, Tensor], nn.Module]


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        name: what the row is called.
        module: what is imported before the clock starts.
        distribution: what is installed.
        apply: makes the model small, given the calibration windows ids_NT.
        about: format and ranges.
        bits: stored bits a weight of the blocks, scales counted; None where weights are zeroed instead.
        windows: of calibration, where none are asked for: as many as the tool does best with on such a model.
    """

    name: str
    module: str
    distribution: str
    apply: Apply
    about: str
    bits: float | None = None
    windows: int = 32


def _modelopt(config: str) -> Apply:
    def apply(model: nn.Module, ids_NT: Tensor) -> nn.Module:
        quantization = importlib.import_module("modelopt.torch.quantization")

        def calibrate(model: nn.Module) -> None:
            for ids_T in ids_NT:
                model(input_ids=ids_T[None], use_cache=False)

        done: nn.Module = quantization.quantize(model, getattr(quantization, config), calibrate)
        return done

    return apply


def _modelopt_sparsegpt(model: nn.Module, ids_NT: Tensor) -> nn.Module:
    sparsity = importlib.import_module("modelopt.torch.sparsity")
    batches = [ids_T[None] for ids_T in ids_NT]
    done: nn.Module = sparsity.sparsify(
        model, "sparsegpt", config={"data_loader": batches, "collect_func": lambda ids: ids}
    )
    return done


def _compressor(*modifiers: Callable[[], Any]) -> Apply:
    def apply(model: nn.Module, ids_NT: Tensor) -> nn.Module:
        from torch.utils.data import DataLoader

        rows: Any = [{"input_ids": ids_T, "attention_mask": ids_T.new_ones(len(ids_T))} for ids_T in ids_NT]
        oneshot = importlib.import_module("llmcompressor").oneshot
        oneshot(
            model=model,
            dataset=DataLoader(rows),
            recipe=[modifier() for modifier in modifiers],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
        return model

    return apply


def _gptq_int4() -> Any:
    formats = importlib.import_module("compressed_tensors.quantization")
    weights = formats.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    group = formats.QuantizationScheme(targets=["Linear"], weights=weights)
    return _modifier("gptq", "GPTQModifier", config_groups={"group_0": group}, ignore=["lm_head"])


def _gptq_w8a8() -> Any:
    return _modifier("gptq", "GPTQModifier", targets="Linear", scheme="W8A8", ignore=["lm_head"])


def _smooth() -> Any:
    return _modifier("transform.smoothquant", "SmoothQuantModifier", smoothing_strength=0.8)


def _sparsegpt() -> Any:
    asked = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    return _modifier("pruning.sparsegpt", "SparseGPTModifier", **asked)


def _modifier(module: str, name: str, **asked: Any) -> Any:
    return getattr(importlib.import_module(f"llmcompressor.modifiers.{module}"), name)(**asked)


_MODELOPT = ("modelopt.torch.quantization", "nvidia-modelopt")
_COMPRESSOR = ("llmcompressor.modifiers.gptq", "llmcompressor")
PEERS = (
    Peer("modelopt-w8a8", *_MODELOPT, _modelopt("INT8_SMOOTHQUANT_CFG"), "static, SmoothQuant", 8.0, windows=128),
    Peer("modelopt-fp8", *_MODELOPT, _modelopt("FP8_DEFAULT_CFG"), "static", 8.0),
    Peer("modelopt-int4-awq", *_MODELOPT, _modelopt("INT4_AWQ_CFG"), "AWQ, block 128", 4.125),
    Peer("modelopt-2:4", "modelopt.torch.sparsity", "nvidia-modelopt", _modelopt_sparsegpt, "SparseGPT"),
    Peer("compressor-int4", *_COMPRESSOR, _compressor(_gptq_int4), "GPTQ, symmetric, block 64", 4.25),
    Peer("compressor-2:4", *_COMPRESSOR, _compressor(_sparsegpt), "SparseGPT", windows=64),
    Peer(
        "compressor-w8a8",
        *_COMPRESSOR,
        _compressor(_smooth, _gptq_w8a8),
        "SmoothQuant, GPTQ; ranges by each token",
        8.0,
    ),
)
