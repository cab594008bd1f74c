"""ONNX Runtime's integer kernels in place of Q/DQ pairs: the same numbers, computed on the integers.

Left to itself, ONNX Runtime dequantizes a whole embedding table at each call, and multiplies in float where several
products read the same rounded activations. Three rewritings mend that:

- A product of INT8 activations and INT8 weights becomes `MatMulIntegerToFloat`, whose INT32 sums are exact. The
  activations become unsigned with the zero at 128, the same grid: signed ones have no fast kernel (31 against 412
  GOP/s on one core with AVX512-VNNI; fp32 102).
- A table of which rows are taken is read raw: the rows that the tokens name are dequantized and no others.
- Weights of products with float activations stay behind their DequantizeLinear, which a session without Q/DQ fusion
  folds when it loads. `MatMulNBits` would keep them small in memory, but at the accuracy level that multiplies in
  float it takes twice the time of fp32, and the faster level rounds the activations, which no other engine of this
  graph does.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

VENDOR = "com.microsoft"
INTEGER_PRODUCT, RAW_ROWS = "MatMulIntegerToFloat", "raw_rows"


def lower(model: ir.Model) -> dict[str, int]:
    """Rewrite the graph in place. Returns how many integer products and raw readings of a table it holds now."""
    graph = model.graph
    counts: Counter[str] = Counter()
    for node in list(graph):
        made = _raw_rows(graph, node) if node.op_type == "Gather" else _integer_product(graph, node)
        if made is None:
            continue
        old, new = node.outputs[0], made.outputs[0]
        new.shape, new.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name
        counts[INTEGER_PRODUCT if made.domain == VENDOR else RAW_ROWS] += 1
    if counts[INTEGER_PRODUCT]:
        model.opset_imports[VENDOR] = 1
    if counts:
        _sweep(graph)
    return dict(counts)


def _integer_product(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """q(x) @ q(w) * (scale of x * scale of w), placed before a MatMul of dequantized values; None: it is none."""
    if node.op_type != "MatMul":
        return None
    weight, activation = _dequantizer(node.inputs[1]), _dequantizer(node.inputs[0])
    if weight is None or activation is None or not _per_column(weight):
        return None
    rounding = _producer(activation.inputs[0])
    if rounding is None or rounding.op_type != "QuantizeLinear":
        return None
    scale, zero = rounding.inputs[1], _constant(graph, "unsigned_zero", np.array(128, dtype=np.uint8))
    unsigned = _unsigned(graph, rounding, zero)
    inputs = [unsigned, weight.inputs[0], scale, weight.inputs[1], zero]
    return _placed(graph, node, INTEGER_PRODUCT, inputs, domain=VENDOR)


def _raw_rows(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """scale[ids] * q[ids], placed before a Gather of rows from a dequantized table; None: it is none."""
    table = _dequantizer(node.inputs[0])
    if table is None or node.attributes.get_int("axis", 0) != 0 or table.attributes.get_int("axis", 1) != 0:
        return None
    if "block_size" in table.attributes:
        return None
    ids = node.inputs[1]
    raw = _placed(graph, node, "Gather", [table.inputs[0], ids], axis=0).outputs[0]
    values = _placed(graph, node, "Cast", [raw], to=int(ir.DataType.FLOAT)).outputs[0]
    scale = _placed(graph, node, "Gather", [table.inputs[1], ids], axis=0).outputs[0]
    last = _constant(graph, "last_axis", np.array([-1], dtype=np.int64))
    scale = _placed(graph, node, "Unsqueeze", [scale, last]).outputs[0]
    return _placed(graph, node, "Mul", [values, scale])


def _unsigned(graph: ir.Graph, rounding: ir.Node, zero: ir.Value) -> ir.Value:
    """The rounded activations on the same grid in UINT8, made once for all products that read them."""
    for user, _ in list(_known(rounding.inputs[0]).uses()):
        if user.op_type == "QuantizeLinear" and user.inputs[1] is rounding.inputs[1] and zero in user.inputs:
            return user.outputs[0]
    return _placed(graph, rounding, "QuantizeLinear", [*rounding.inputs[:2], zero]).outputs[0]


def _per_column(weight: ir.Node) -> bool:
    """Constant INT8 [I, O] with a scale for each of the O columns."""
    q, scale = weight.inputs[0], weight.inputs[1]
    if q is None or scale is None or q.const_value is None or "block_size" in weight.attributes:
        return False
    return q.const_value.dtype == ir.DataType.INT8 and weight.attributes.get_int("axis", 1) == 1


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = _producer(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _placed(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: list[ir.Value | None], *, domain: str = "", **attributes: int
) -> ir.Node:
    typed = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    made = ir.Node(domain, kind, inputs, typed, num_outputs=1)
    graph.insert_before(before, made)
    return made


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
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
