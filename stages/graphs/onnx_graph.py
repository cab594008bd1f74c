"""What an ONNX graph holds, read from its bytes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from stages.runtime.contract import StageError

EXTERNAL_BYTES = 1_500_000_000
"""From here on weights lie beside the graph: one protobuf message ends at 2 GiB."""
BYTE = 8
_PLACE = "place"
"""Of a constant, under `Value.meta`: the file and the offset that it was read from."""

_PRECISIONS = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8", ir.DataType.UINT8: "int8", ir.DataType.INT4: "int4", ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}  # fmt: skip


_PACKED = ("MatMulNBits", 1)
_DEQUANTIZED, _AS_SCALE = ("DequantizeLinear", 0), ("DequantizeLinear", 1)


@dataclass(frozen=True)
class Held:
    """The constants of a graph.

    Attributes:
        quantized: (bits, values) of each weight of few bits behind a DequantizeLinear -> how many are like it.
        precisions: number formats that weights and activations have.
        rounding: weight -> the scales by which the activations that it multiplies are rounded to INT8 or FP8.
        caches: scales of all other rounding, that of keys and values.
        size_bytes: of all constants, each counted once.
        nodes: operations.
        opset: version of the operators.
    """

    quantized: Counter[tuple[int, int]]
    precisions: frozenset[str]
    rounding: dict[str, frozenset[float]]
    caches: Counter[float]
    size_bytes: int
    nodes: int
    opset: int


def load(path: Path) -> ir.Model:
    """The graph of a file; external data is read when it is used.

    Raises:
        StageError: the file is no ONNX graph, or its weights are not beside it.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships with onnx

    try:
        model = ir.load(path)
    except (DecodeError, ValueError) as error:
        raise StageError(f"{path.name} is no ONNX graph", measured=error, remedy="Export it again.") from error
    beside: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.meta[_PLACE] = str(path.parent / value.const_value.location), value.const_value.offset
            value.const_value = _mapped(value.const_value, path, beside)
    return model


def _mapped(
    tensor: ir.ExternalTensor, graph: Path, beside: dict[Path, np.memmap[Any, np.dtype[np.uint8]]]
) -> ir.TensorProtocol:
    """Weights beside a graph, in pages of their file.

    onnx and onnx_ir refuse a file that has more than one name, and what a store shows has: its bytes lie there once.
    """
    named = graph.parent / tensor.location
    file = named.resolve()
    if file not in beside:
        # Where a store is only looked into, the graph is a link itself.
        near = file.parent == graph.parent.resolve() or (graph.is_symlink() and named.parent == graph.parent)
        if not near or not file.is_file():
            raise StageError(
                f"the weights of {graph.name} are not beside it",
                measured=f"{tensor.location}: {'in another folder' if file.is_file() else 'no such file'}",
                limit="a file in the graph's folder",
                remedy="Export it again.",
            )
        beside[file] = np.memmap(file, dtype=np.uint8, mode="r")
    offset, whole = tensor.offset or 0, beside[file]
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if offset + length > len(whole):
        raise StageError(
            f"{file.name} ends before {tensor.name}",
            measured=f"{len(whole)} bytes",
            limit=f"{offset + length} bytes",
            remedy="Export it again.",
        )
    raw = whole[offset : offset + length]
    if tensor.dtype.bitwidth < BYTE:
        return ir.PackedTensor(raw, tensor.dtype, shape=tensor.shape, name=tensor.name)
    return ir.Tensor(raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy()), name=tensor.name)


def save(model: ir.Model, path: Path) -> None:
    """Write a graph; large ones with their weights in `<name>.data` beside it.

    The graph may be read from the very files: they are replaced once all is written.
    """
    large = size_bytes(model) > EXTERNAL_BYTES
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".graph-") as folder:
        written = Path(folder) / path.name
        ir.save(model, written, external_data=f"{path.name}.data" if large else None)
        for one in sorted(written.parent.iterdir(), reverse=True):  # weights first
            one.replace(path.parent / one.name)
    if not large:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # of a larger one before


def size_bytes(*models: ir.Model) -> int:
    """Bytes of all constants, each counted once, of several graphs those that lie in one place."""
    return sum(one.const_value.nbytes for one in _distinct(models) if one.const_value is not None)


def held(*models: ir.Model) -> Held:
    """Count what a graph holds, or several that share their weights."""
    quantized: Counter[tuple[int, int]] = Counter()
    precisions: set[str] = set()
    constants = _distinct(models)
    for value in constants:
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _PRECISIONS:
            continue
        packed = [
            user.attributes.get_int("bits", 4) for user, place in value.uses() if (user.op_type, place) == _PACKED
        ]
        precisions.add(f"int{packed[0]}" if packed else _PRECISIONS[tensor.dtype])
        readers = [user for user, place in value.uses() if (user.op_type, place) == _DEQUANTIZED]
        uses = [(user.op_type, place) for reader in readers for user, place in reader.outputs[0].uses()]
        # Scales of NVFP4 blocks are themselves of few bits.
        if any(use != _AS_SCALE for use in uses):
            quantized[tensor.dtype.bitwidth, tensor.size] += 1
    rounding: dict[str, frozenset[float]] = {}
    caches: Counter[float] = Counter()
    for model in models:
        products, others = _rounding(model)
        rounding |= {name: rounding.get(name, frozenset()) | scales for name, scales in products.items()}
        caches += others
    nodes, opset = sum(len(model.graph) for model in models), models[0].opset_imports[""]
    return Held(quantized, frozenset(precisions), rounding, caches, size_bytes(*models), nodes, opset)


def _distinct(models: Sequence[ir.Model]) -> list[ir.Value]:
    """The constants of graphs, without those that lie where an earlier graph's lie."""
    found: list[ir.Value] = []
    known: set[tuple[str, int | None]] = set()
    for model in models:
        values = list(model.graph.initializers.values())
        places = {value: value.meta[_PLACE] for value in values if _PLACE in value.meta}
        found += [value for value in values if places.get(value) not in known]
        known |= set(places.values())
    return found


def drop_rounding(model: ir.Model) -> int:
    """Let every product read its activations as they were before QuantizeLinear. Returns how many were dropped.

    What is left agrees with its source to the last digits. With rounding it need not: one value that falls to the
    other side of a step moves all later ones, in a model with outliers by several standard deviations.
    """
    dropped = 0
    for node in list(model.graph):
        rounding = _rounded_by(node)
        if rounding is None or rounding.inputs[0] is None:
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], rounding.inputs[0])
        model.graph.remove(node, safe=True)
        dropped += 1
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and not node.outputs[0].uses():
            model.graph.remove(node, safe=True)
    return dropped


def widen_fp4(model: ir.Model) -> int:
    """Put the values that four-bit floats stand for in their places, for runtimes that have none. Returns how many."""
    widened = 0
    for node in list(model.graph):
        q = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if q is None or q.const_value is None or q.const_value.dtype != ir.DataType.FLOAT4E2M1:
            continue
        q_IO, scale_GO = q.const_value.numpy().astype(np.float32), _scales(node.inputs[1])
        w_IO = q_IO * scale_GO.repeat(len(q_IO) // len(scale_GO), axis=0)
        name = f"{q.name}.wide"
        tensor = ir.tensor(w_IO, name=name)
        wide = ir.Value(name=name, const_value=tensor, shape=ir.Shape(w_IO.shape), type=ir.TensorType(tensor.dtype))
        model.graph.register_initializer(wide)
        ir.convenience.replace_all_uses_with(node.outputs[0], wide)
        model.graph.remove(node, safe=True)
        widened += 1
    return widened


def _scales(value: ir.Value | None) -> NDArray[np.float32]:
    assert value is not None
    if value.const_value is not None:
        found: NDArray[np.float32] = value.const_value.numpy().astype(np.float32)
        return found
    node = value.producer()
    assert node is not None
    if node.op_type == "Cast":
        return _scales(node.inputs[0])
    return _scales(node.inputs[0]) * _scales(node.inputs[1])


def _rounding(model: ir.Model) -> tuple[dict[str, frozenset[float]], Counter[float]]:
    found: dict[str, set[float]] = {}
    products: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        left, right = (None if value is None else value.producer() for value in node.inputs)
        rounding = None if left is None else _rounded_by(left)
        if rounding is not None and right is not None and right.inputs[0] is not None:
            found.setdefault(str(right.inputs[0].name), set()).add(_scale(rounding))
            products.add(rounding)
    others = (node for node in model.graph if node.op_type == "QuantizeLinear" and node not in products)
    return {name: frozenset(scales) for name, scales in found.items()}, Counter(map(_scale, others))


def _scale(rounding: ir.Node) -> float:
    scale = rounding.inputs[1]
    assert scale is not None and scale.const_value is not None
    return float(scale.const_value.numpy())


def _rounded_by(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear before a DequantizeLinear of activations."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    producer = node.inputs[0].producer()
    return producer if producer is not None and producer.op_type == "QuantizeLinear" else None


def pack_weights(graph: ir.Graph) -> int:
    """Pack the weights of block-wise DequantizeLinear nodes two a byte: int8 to INT4, uint8 codes to FLOAT4E2M1.

    Returns:
        How many there are.
    """
    packed: set[str] = set()
    for node in graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" and "block_size" in node.attributes else None
        if weight is None or weight.const_value is None or weight.name in packed:
            continue
        q_IO = weight.const_value.numpy()
        kind = ir.DataType.FLOAT4E2M1 if q_IO.dtype == np.uint8 else ir.DataType.INT4
        nibbles = q_IO.reshape(-1).view(np.uint8) & 0x0F
        bytes_ = nibbles[0::2] | (nibbles[1::2] << 4)
        weight.const_value = ir.PackedTensor(bytes_, dtype=kind, shape=q_IO.shape, name=weight.name)
        weight.dtype = kind
        packed.add(str(weight.name))
    return len(packed)
