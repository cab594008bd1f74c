"""Quantized layers: integer weights and their scales, computed the way an engine computes them.

In torch `forward` is fake quantization in float: what an engine gives that multiplies the dequantized values. Under
`torch.export` it writes QuantizeLinear and DequantizeLinear nodes instead; call `for_export` on the model first.

Shapes: O outputs, I inputs, B block length along I, V vocabulary, H hidden, ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import ops

from stages.algorithms.rounding import fake_round

_NOTES = "quantization_notes"


def pack_int4(q_OI: Tensor) -> Tensor:
    """Two signed 4-bit values a byte along I, the first in the low nibble: int8 [O, I] -> uint8 [O, I/2]."""
    low, high = q_OI[:, 0::2] & 0x0F, q_OI[:, 1::2] & 0x0F
    return (low | (high << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: uint8 [O, I/2] -> int8 [O, I] in -8..7."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


class QuantizedLinear(nn.Module):
    """A linear layer on integer weights.

    Attributes:
        bits: 8 or 4.
        block: inputs that share a scale; None for one scale an output row.
        weight: int8 [O, I], or uint8 [O, I/2] with two 4-bit values a byte.
        weight_scale: float [O] or [O, I/B].
        input_scale: float scalar: the input is rounded to INT8 with it; None: the input stays as it is.
        transposed: laid out by `for_export` as int8 [I, O] and [I/B, O].
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bits: int = 8,
        block: int | None = None,
        input_int8: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.block = inputs, outputs, bits, block
        self.transposed = False
        stored = (outputs, inputs) if bits == 8 else (outputs, inputs // 2)
        self.register_buffer("weight", torch.zeros(stored, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("weight_scale", torch.ones((outputs, inputs // block) if block else (outputs,)))
        self.register_buffer("input_scale", torch.ones(()) if input_int8 else None)
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)

    def dequantized(self) -> Tensor:
        """w_OI as float."""
        q_OI = self.weight if self.bits == 8 else unpack_int4(self.weight)
        if self.block is None:
            return q_OI * self.weight_scale[:, None]
        return (q_OI.unflatten(1, (-1, self.block)) * self.weight_scale[:, :, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if torch.compiler.is_exporting():
            return self._exported(x)
        if self.input_scale is not None:
            x = fake_round(x, self.input_scale)
        w_OI = self.dequantized()
        return functional.linear(x.to(w_OI.dtype), w_OI, self.bias)

    def _exported(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            q = _quantize_node(x, self.input_scale)
            x = _dequantize_node(q, self.input_scale, {})
        if not self.transposed:
            # The table that it shares with the embedding lies as rows: one initializer, transposed after the scales.
            return functional.linear(x, _dequantize_node(self.weight, self.weight_scale, {"axis": 0}), self.bias)
        attributes = {"axis": 1} if self.block is None else {"axis": 0, "block_size": self.block}
        y = torch.matmul(x, _dequantize_node(self.weight, self.weight_scale, attributes))
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """A table of INT8 rows with a scale each; the head may share its tensors.

    Attributes:
        weight: int8 [V, H].
        weight_scale: float [V].
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, hidden
        self.register_buffer("weight", torch.zeros((rows, hidden), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]."""
        if torch.compiler.is_exporting():
            # Engines refuse a Gather of raw INT8: the rows are taken from the dequantized table.
            return functional.embedding(ids, _dequantize_node(self.weight, self.weight_scale, {"axis": 0}))
        return functional.embedding(ids, self.weight) * self.weight_scale[ids].unsqueeze(-1)


def _quantize_node(x: Tensor, scale: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int8)
    return ops.symbolic("QuantizeLinear", (x, scale, zero), {}, dtype=torch.int8, shape=x.shape)


def _dequantize_node(q: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
    return ops.symbolic("DequantizeLinear", (q, scale), attributes, dtype=scale.dtype, shape=q.shape)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """Every quantized module once, by its first name."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def install(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Put empty quantized modules where `spec` says; the caller loads their tensors.

    A module that stands at several places (the basis of a group) is replaced at all of them by one instance. Tensors
    that the spec calls tied are one tensor afterwards.

    Raises:
        ValueError: the spec names a module that the model has not.
    """
    places = dict(model.named_modules(remove_duplicate=False))
    for name, entry in spec["layers"].items():
        if name not in places:
            raise ValueError(f"quantization names {name}, which the model has not")
        replace(model, name, _empty(places[name], entry))
    modules = quantized_modules(model)
    for name, entry in spec["layers"].items():
        if "tied_to" in entry:
            modules[name].weight = modules[entry["tied_to"]].weight
            modules[name].weight_scale = modules[entry["tied_to"]].weight_scale
    notes = {key: value for key, value in spec.items() if key != "layers"}
    why = {name: entry["note"] for name, entry in spec["layers"].items() if "note" in entry}
    annotate(model, notes, why)


def annotate(model: nn.Module, notes: Mapping[str, Any], of_layers: Mapping[str, Any]) -> None:
    """Keep what cannot be read from the modules (scheme, reasons) for `describe`."""
    setattr(model, _NOTES, (dict(notes), dict(of_layers)))


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The spec with which `install` makes this model's modules; None when nothing is quantized."""
    modules = quantized_modules(model)
    if not modules:
        return None
    kept: tuple[dict[str, Any], dict[str, Any]] = getattr(model, _NOTES, ({}, {}))
    notes, of_layers = kept
    first: dict[int, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        entry = _entry(module)
        owner = first.setdefault(id(module.weight), name)
        if owner != name:
            entry["tied_to"] = owner
        if name in of_layers:
            entry["note"] = of_layers[name]
        layers[name] = entry
    return {**notes, "layers": layers}


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module called `name` stands."""
    places = dict(model.named_modules(remove_duplicate=False))
    old = places[name]
    for place, module in places.items():
        if module is old:
            parent, _, attribute = place.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)


def _empty(old: nn.Module, entry: Mapping[str, Any]) -> QuantizedLinear | QuantizedEmbedding:
    if entry["kind"] == "embedding":
        return QuantizedEmbedding(*entry["shape"])
    outputs, inputs = entry["shape"]
    return QuantizedLinear(
        inputs,
        outputs,
        bits=entry["bits"],
        block=entry["block"],
        input_int8=entry["input"] == "int8",
        bias=getattr(old, "bias", None) is not None,
    )


def _entry(module: QuantizedLinear | QuantizedEmbedding) -> dict[str, Any]:
    if isinstance(module, QuantizedEmbedding):
        shape = [module.num_embeddings, module.embedding_dim]
        return {"kind": "embedding", "shape": shape, "bits": 8, "granularity": "row"}
    return {
        "kind": "linear",
        "shape": [module.out_features, module.in_features],
        "bits": module.bits,
        "granularity": "channel" if module.block is None else "block",
        "block": module.block,
        "scales": list(module.weight_scale.shape),
        "input": "float" if module.input_scale is None else "int8",
    }


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Type of every tensor in a checkpoint's files, as safetensors calls it: I8, U8, F32, ..."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    return found


def for_export(model: nn.Module) -> None:
    """Lay weights out as [I, O] in place, the order in which MatMul takes them without a Transpose.

    INT4 is unpacked to int8, since torch has no tensor of INT4; `pack_initializers` packs it in the exported graph.
    Tensors that several modules share stay rows.
    """
    modules = quantized_modules(model)
    uses: dict[int, int] = {}
    for module in modules.values():
        uses[id(module.weight)] = uses.get(id(module.weight), 0) + 1
    for module in modules.values():
        if isinstance(module, QuantizedLinear) and uses[id(module.weight)] == 1 and not module.transposed:
            q_OI = module.weight if module.bits == 8 else unpack_int4(module.weight)
            module.weight = q_OI.t().contiguous()
            if module.block is not None:
                module.weight_scale = module.weight_scale.t().contiguous()
            module.transposed = True


def pack_initializers(graph: onnx_ir.Graph) -> int:
    """Turn the int8 weights of block-wise DequantizeLinear nodes into INT4, two a byte. Returns how many."""
    packed: set[str] = set()
    for node in graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" and "block_size" in node.attributes else None
        if weight is None or weight.const_value is None or weight.name in packed:
            continue
        q_IO = weight.const_value.numpy().astype(np.int8)
        nibbles = (q_IO.reshape(-1) & 0x0F).view(np.uint8)
        bytes_ = nibbles[0::2] | (nibbles[1::2] << 4)
        weight.const_value = onnx_ir.PackedTensor(
            bytes_, dtype=onnx_ir.DataType.INT4, shape=q_IO.shape, name=weight.name
        )
        weight.dtype = onnx_ir.DataType.INT4
        packed.add(str(weight.name))
    return len(packed)
