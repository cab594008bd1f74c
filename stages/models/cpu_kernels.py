"""ONNX Runtime's integer kernels in place of Q/DQ pairs: the same numbers, computed on the integers.

Left to itself, ONNX Runtime dequantizes a whole embedding table at each call, and keeps pairs of which several products
read the same activations in float. This rewriting names the kernel of every quantized product instead:

- INT8 activations and weights: `MatMulIntegerToFloat`, whose INT32 sums are exact.
- INT8 or INT4 weights alone: `MatMulNBits` at accuracy level 1, which multiplies in float. Level 4 would round the
  activations to INT8 as well, which no other engine of this graph does.
- A table that gives rows and also multiplies (tied embedding): one initializer, of which `Gather` takes raw rows.

Shapes: O outputs, I inputs, V rows of a table, H hidden, B block length, K blocks a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

VENDOR = "com.microsoft"
FLOAT_PRODUCTS = 1
"""`accuracy_level` of MatMulNBits that multiplies in fp32."""

_BLOCKS = (128, 64, 32, 16)
_RESHAPED = 3


@dataclass(frozen=True)
class Weight:
    """A DequantizeLinear of constants.

    Attributes:
        node: the DequantizeLinear.
        quantized: the integers.
        scale: the scales.
        bits: 8 or 4.
        axis: along which the scales lie, or the blocks.
        block: inputs that share a scale, 0 for one scale a channel.
    """

    node: ir.Node
    quantized: ir.Value
    scale: ir.Value
    bits: int
    axis: int
    block: int


def lower(model: ir.Model) -> dict[str, int]:
    """Rewrite the graph in place; returns how many products of each kernel it now holds, and rows read raw."""
    graph = model.graph
    counts: dict[str, int] = {}
    tables: dict[str, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        made = _lowered(graph, node, tables)
        if made is None:
            continue
        old, new = node.outputs[0], made.outputs[0]
        new.shape, new.dtype, name = old.shape, old.dtype, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name
        kernel = made.op_type if made.domain == VENDOR else "rows"
        counts[kernel] = counts.get(kernel, 0) + 1
    if counts:
        model.opset_imports[VENDOR] = 1
        _sweep(graph)
    return counts


def _lowered(graph: ir.Graph, node: ir.Node, tables: dict[str, tuple[ir.Value, ir.Value]]) -> ir.Node | None:
    """The node whose only output replaces that of `node`, inserted before it; None: nothing to do."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        table = _weight(node.inputs[0])
        return None if table is None else _rows(graph, node, _table(graph, table, tables), table)
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    if producer is not None and producer.op_type == "Transpose":
        table = _weight(producer.inputs[0])
        return None if table is None else _times_table(graph, node, _table(graph, table, tables))
    weight = _weight(node.inputs[1])
    if weight is None:
        return None
    rounded = _rounded(node.inputs[0])
    if rounded is not None and weight.bits == 8 and weight.block == 0:
        inputs = [rounded.outputs[0], weight.quantized, rounded.inputs[1], weight.scale]
        return _placed(graph, node, "MatMulIntegerToFloat", inputs, {}, VENDOR)
    q_OI, scale_OK, block = _rows_first(weight)
    packed, scales = _constants(graph, weight, _packed(q_OI, weight.bits, block), scale_OK)
    return _nbits(graph, node, packed, scales, q_OI.shape, weight.bits, block)


def _weight(value: ir.Value | None) -> Weight | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    quantized, scale = node.inputs[0], node.inputs[1]
    if quantized is None or scale is None or quantized.const_value is None or scale.const_value is None:
        return None
    bits = 4 if quantized.const_value.dtype == ir.DataType.INT4 else 8
    attributes = node.attributes
    return Weight(node, quantized, scale, bits, attributes.get_int("axis", 1), attributes.get_int("block_size", 0))


def _rounded(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear behind a dequantized activation."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    source = node.inputs[0].producer()
    return source if source is not None and source.op_type == "QuantizeLinear" else None


def _rows_first(weight: Weight) -> tuple[NDArray[np.int8], NDArray[np.float32], int]:
    """q_OI, scale_OK and the block length of a weight that lies as [I, O]."""
    assert weight.quantized.const_value is not None and weight.scale.const_value is not None
    q_OI = np.ascontiguousarray(weight.quantized.const_value.numpy().astype(np.int8).T)
    scale = weight.scale.const_value.numpy()
    if weight.block:
        return q_OI, np.ascontiguousarray(scale.T), weight.block
    block = _block(q_OI.shape[1])
    return q_OI, np.repeat(scale[:, None], -(-q_OI.shape[1] // block), axis=1), block


def _block(inputs: int) -> int:
    """The longest block that fills `inputs` without a rest; the kernel pads where none does."""
    return next((block for block in _BLOCKS if inputs % block == 0), _BLOCKS[-1])


def _packed(q_OI: NDArray[np.int8], bits: int, block: int) -> NDArray[np.uint8]:
    """[O, K, B] unsigned with the zero in the middle, or [O, K, B/2] with two 4-bit values a byte, low first."""
    rest = -q_OI.shape[1] % block
    u_OKB = (np.pad(q_OI, ((0, 0), (0, rest))).astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    u_OKB = u_OKB.reshape(len(q_OI), -1, block)
    return u_OKB if bits == 8 else u_OKB[..., 0::2] | (u_OKB[..., 1::2] << 4)


def _table(
    graph: ir.Graph, table: Weight, tables: dict[str, tuple[ir.Value, ir.Value]]
) -> tuple[ir.Value, ir.Value]:
    """The packed rows and scales of a table [V, H], made at its first use."""
    name = str(table.quantized.name)
    if name not in tables:
        assert table.quantized.const_value is not None and table.scale.const_value is not None
        q_VH = table.quantized.const_value.numpy()
        block = _block(q_VH.shape[1])
        scale_VK = np.repeat(table.scale.const_value.numpy()[:, None], -(-q_VH.shape[1] // block), axis=1)
        tables[name] = _constants(graph, table, _packed(q_VH, 8, block), scale_VK)
    return tables[name]


def _times_table(graph: ir.Graph, node: ir.Node, table: tuple[ir.Value, ir.Value]) -> ir.Node:
    transposed = node.inputs[1]
    assert transposed is not None and transposed.producer() is not None
    producer = transposed.producer()
    assert producer is not None and producer.inputs[0] is not None
    weight = _weight(producer.inputs[0])
    assert weight is not None and weight.quantized.const_value is not None
    shape = weight.quantized.const_value.numpy().shape
    return _nbits(graph, node, *table, shape, 8, _block(shape[1]))


def _nbits(
    graph: ir.Graph, node: ir.Node, packed: ir.Value, scales: ir.Value, shape: tuple[int, ...], bits: int, block: int
) -> ir.Node:
    attributes = {
        "K": shape[1], "N": shape[0], "bits": bits, "block_size": block, "accuracy_level": FLOAT_PRODUCTS,
    }  # fmt: skip
    return _placed(graph, node, "MatMulNBits", [node.inputs[0], packed, scales], attributes, VENDOR)


def _rows(graph: ir.Graph, node: ir.Node, table: tuple[ir.Value, ir.Value], weight: Weight) -> ir.Node:
    """scale[ids] * (raw[ids] - 128), over the rows that the ids name and no others."""
    packed, scales = table
    assert weight.quantized.const_value is not None
    hidden = weight.quantized.const_value.shape[1]
    assert packed.const_value is not None and isinstance(hidden, int)
    raw = _placed(graph, node, "Gather", [packed, node.inputs[1]], {"axis": 0}).outputs[0]
    signed = _placed(graph, node, "Cast", [raw], {"to": int(ir.DataType.FLOAT)}).outputs[0]
    zero = _constant(graph, f"{packed.name}.zero", np.array(128.0, dtype=np.float32))
    signed = _placed(graph, node, "Sub", [signed, zero], {}).outputs[0]
    scale = _placed(graph, node, "Gather", [scales, node.inputs[1]], {"axis": 0}).outputs[0]
    last = _constant(graph, f"{packed.name}.last", np.array([-1], dtype=np.int64))
    scale = _placed(graph, node, "Unsqueeze", [scale, last], {}).outputs[0]
    values = _placed(graph, node, "Mul", [signed, scale], {}).outputs[0]
    width = int(np.prod(packed.const_value.numpy().shape[1:]))
    shape = _constant(graph, f"{packed.name}.width", np.array([0, 0, width], dtype=np.int64))
    whole = _placed(graph, node, "Reshape", [values, shape], {})
    if width == hidden:
        return whole
    start = _constant(graph, f"{packed.name}.start", np.array([0], dtype=np.int64))
    end = _constant(graph, f"{packed.name}.end", np.array([hidden], dtype=np.int64))
    return _placed(graph, node, "Slice", [whole.outputs[0], start, end, last], {})


def _placed(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: list[ir.Value | None], attributes: dict[str, int], domain: str = ""
) -> ir.Node:
    typed = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    made = ir.Node(domain, kind, inputs, typed, num_outputs=1)
    graph.insert_before(before, made)
    return made


def _constants(
    graph: ir.Graph, weight: Weight, packed: NDArray[np.uint8], scale_OK: NDArray[np.float32]
) -> tuple[ir.Value, ir.Value]:
    name = str(weight.quantized.name)
    return (
        _constant(graph, f"{name}.packed", packed),
        _constant(graph, f"{name}.scales", np.ascontiguousarray(scale_OK)),
    )


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
    return graph.initializers[name]


def _sweep(graph: ir.Graph) -> None:
    """Remove nodes and constants that nothing reads any more."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
