"""Published tools on the same model and the same windows, where they are installed.

A peer quantizes or prunes a model in memory and leaves it there: activations are rounded as it runs, so that it is
scored in the process that made it. Some can be saved in a format that `fetch` reads, and be judged as ours are. Neither
tool is a dependency of ours; each may live in an interpreter of its own.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tests.benchmarks import peers_saved

Apply = Callable[[nn.Module, Tensor], nn.Module]
Save = Callable[[Any, Path], None]


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
        save: writes the model into a folder that `fetch` reads; None where it computes what our layers do not.
        ours: the technique of ours whose format it is saved in.
    """

    name: str
    module: str
    distribution: str
    apply: Apply
    about: str
    bits: float | None = None
    windows: int = 32
    save: Save | None = None
    ours: str = ""


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


def _gptq_int8(*, inputs: bool) -> Callable[[], Any]:
    """INT8 rows; with `inputs`, one fixed range of each map's inputs, as our layers and TensorRT have it."""

    def made() -> Any:
        formats = importlib.import_module("compressed_tensors.quantization")
        given = {"num_bits": 8, "type": "int", "symmetric": True}
        weights = formats.QuantizationArgs(**given, strategy="channel")
        read = formats.QuantizationArgs(**given, strategy="tensor", dynamic=False) if inputs else None
        group = formats.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=read)
        return _modifier("gptq", "GPTQModifier", config_groups={"group_0": group}, ignore=["lm_head"])

    return made


def _nearest(scheme: str) -> Callable[[], Any]:
    """Rounded to nearest, as the tool's own examples have it for floats of few bits."""
    return lambda: _modifier(
        "quantization", "QuantizationModifier", targets="Linear", scheme=scheme, ignore=["lm_head"]
    )


def _smooth() -> Any:
    return _modifier("transform.smoothquant", "SmoothQuantModifier", smoothing_strength=0.8)


def _sparsegpt() -> Any:
    asked = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    return _modifier("pruning.sparsegpt", "SparseGPTModifier", **asked)


def _modifier(module: str, name: str, **asked: Any) -> Any:
    return getattr(importlib.import_module(f"llmcompressor.modifiers.{module}"), name)(**asked)


_MODELOPT = ("modelopt.torch.quantization", "nvidia-modelopt")
_COMPRESSOR = ("llmcompressor.modifiers.gptq", "llmcompressor")


def _compressor_peer(
    name: str, apply: Apply, about: str, bits: float | None, ours: str, *, windows: int = 32, saved: bool = True
) -> Peer:
    save = peers_saved.compressed if saved else None
    return Peer(f"compressor-{name}", *_COMPRESSOR, apply, about, bits, windows, save, ours)


PEERS = (
    Peer(
        "modelopt-w8a8",
        *_MODELOPT,
        _modelopt("INT8_SMOOTHQUANT_CFG"),
        "static, SmoothQuant",
        8.0,
        windows=128,
        ours="w8a8",
    ),
    Peer(
        "modelopt-fp8",
        *_MODELOPT,
        _modelopt("FP8_DEFAULT_CFG"),
        "static",
        8.0,
        save=peers_saved.modelopt_fp8,
        ours="fp8",
    ),
    Peer("modelopt-int4-awq", *_MODELOPT, _modelopt("INT4_AWQ_CFG"), "AWQ, block 128", 4.125, ours="int4"),
    Peer(
        "modelopt-2:4",
        "modelopt.torch.sparsity",
        "nvidia-modelopt",
        _modelopt_sparsegpt,
        "SparseGPT",
        save=peers_saved.modelopt_sparse,
        ours="2:4-sparsegpt",
    ),
    _compressor_peer("int4", _compressor(_gptq_int4), "GPTQ, symmetric, block 64", 4.25, "int4"),
    _compressor_peer("2:4", _compressor(_sparsegpt), "SparseGPT", None, "2:4-sparsegpt", windows=64),
    _compressor_peer(
        "w8a8", _compressor(_smooth, _gptq_w8a8), "SmoothQuant, GPTQ; ranges by each token", 8.0, "w8a8", saved=False
    ),
    _compressor_peer(
        "w8a8-static",
        _compressor(_smooth, _gptq_int8(inputs=True)),
        "SmoothQuant, GPTQ; static",
        8.0,
        "w8a8",
        windows=128,
    ),
    _compressor_peer("int8", _compressor(_gptq_int8(inputs=False)), "GPTQ", 8.0, "int8"),
    _compressor_peer("fp8", _compressor(_nearest("FP8")), "static", 8.0, "fp8"),
    _compressor_peer("nvfp4", _compressor(_nearest("NVFP4A16")), "to nearest", 4.5, "nvfp4"),
    _compressor_peer("mxfp4", _compressor(_nearest("MXFP4A16")), "to nearest", 4.25, "mxfp4"),
)
