"""What an ONNX graph holds, read from its bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from stages.runtime.contract import StageError

EXTERNAL_BYTES = 1_500_000_000
"""From here on weights lie beside the graph: one protobuf message ends at 2 GiB."""

_PRECISIONS = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8", ir.DataType.UINT8: "int8", ir.DataType.INT4: "int4", ir.DataType.FLOAT8E4M3FN: "fp8",
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    """The constants of a graph.

    Attributes:
        quantized: (bits, values) of each integer tensor behind a DequantizeLinear -> how many are like it.
        precisions: number formats that weights and activations have.
        rounds_activations: whether activations are rounded to integers.
        size_bytes: of all constants, each counted once.
        nodes: operations.
    """

    quantized: Counter[tuple[int, int]]
    precisions: frozenset[str]
    rounds_activations: bool
    size_bytes: int
    nodes: int


def load(path: Path) -> ir.Model:
    """The graph of a file; external data is read when it is used.

    Raises:
        StageError: the file is no ONNX graph.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships with onnx

    try:
        return ir.load(path)
    except (DecodeError, ValueError) as error:
        raise StageError(f"{path.name} is no ONNX graph", measured=error, remedy="Export it again.") from error


def save(model: ir.Model, path: Path) -> None:
    """Write a graph; large ones with their weights in `<name>.data` beside it."""
    large = size_bytes(model) > EXTERNAL_BYTES
    ir.save(model, path, external_data=f"{path.name}.data" if large else None)


def size_bytes(model: ir.Model) -> int:
    """Bytes of all constants, each counted once."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def held(model: ir.Model) -> Held:
    """Count what a graph holds."""
    quantized: Counter[tuple[int, int]] = Counter()
    precisions: set[str] = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _PRECISIONS:
            continue
        precisions.add(_PRECISIONS[tensor.dtype])
        kinds = {(user.op_type, place) for user, place in value.uses()}
        if ("DequantizeLinear", 0) in kinds:
            quantized[tensor.dtype.bitwidth, tensor.size] += 1
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph)
    return Held(quantized, frozenset(precisions), rounds, size_bytes(model), len(model.graph))
