"""Constants laid out so that a plan holds each weight once and fewer kernels.

A builder writes a constant number into the text of the kernel that uses it: thirty layers that round by thirty scales
are thirty kernels of 145 KB of text. And a table that is looked up by rows and multiplied by columns it stores in both
orders. Neither rewriting changes a bit of what the graph says. Kernels that sum over a row, as norms do, and those of
attention to one token stand in the plan once for each place that runs them, even where their texts are equal byte for
byte (TensorRT-RTX 1.7): of SmolLM2's 36 MB of texts these are 21, which no rewriting of constants changes.

Shapes: N sequences, T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stages.graphs.ort_nodes import constant, placed, sweep

_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)
_ONE = "one_step"


def share(model: ir.Model) -> None:
    """Rewrite in place."""
    _share_kernels(model.graph)
    _share_tables(model.graph)
    sweep(model.graph)


def _share_kernels(graph: ir.Graph) -> None:
    """Divide by a scale's vector before rounding to whole steps: x / s is rounded to the same numbers."""
    for node in [one for one in graph if one.op_type == "QuantizeLinear"]:
        value, scale = node.inputs[0], node.inputs[1]
        if value is None or scale is None or scale.const_value is None or scale.const_value.size != 1:
            continue
        width = value.shape[-1] if value.shape is not None and len(value.shape) else None
        if not isinstance(width, int):
            continue
        s = scale.const_value.numpy()
        divisor_H = constant(graph, f"{scale.name}.{width}_times", np.full(width, s.item(), s.dtype))
        steps = placed(graph, node, "Div", [value, divisor_H]).outputs[0]
        steps.shape, steps.type = value.shape, value.type
        node.replace_input_with(0, steps)
        node.replace_input_with(1, constant(graph, f"{_ONE}_{s.dtype}", np.array(1, s.dtype)))


def _share_tables(graph: ir.Graph) -> None:
    """Look rows of a table up as columns of the transposed one, where that is multiplied: builders keep its order."""
    for node in [one for one in graph if one.op_type == "Gather"]:
        table = node.inputs[0]
        made = None if table is None else table.producer()
        if table is None or made is None or made.op_type != "DequantizeLinear":
            continue
        if node.attributes.get_int("axis", 0) != 0:
            continue
        held, turned = made.inputs[0], [user for user, _ in table.uses() if user.op_type == "Transpose"]
        if not turned or held is None or held.const_value is None or held.const_value.dtype not in _EIGHT_BITS:
            continue
        columns_HV = _turned(graph, node, table, [1, 0])
        ids_NT, found = node.inputs[1], node.outputs[0]
        rows_HNT = placed(graph, node, "Gather", [columns_HV, ids_NT], axis=1).outputs[0]
        rows_NTH = _turned(graph, node, rows_HNT, [1, 2, 0])
        rows_NTH.shape, rows_NTH.type = found.shape, found.type
        ir.convenience.replace_all_uses_with(found, rows_NTH)
        for other in turned:
            ir.convenience.replace_all_uses_with(other.outputs[0], columns_HV)


def _turned(graph: ir.Graph, before: ir.Node, value: ir.Value, order: list[int]) -> ir.Value:
    node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", order)], num_outputs=1)
    graph.insert_before(before, node)
    return node.outputs[0]
