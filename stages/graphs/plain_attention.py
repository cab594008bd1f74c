"""Attention whose scores are capped, as products and a softmax: TensorRT's own operator has no cap.

Shapes: N sequences, T tokens, Q heads of queries, G of keys and values, R queries to each of them, D their size.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stages.graphs.ort_nodes import constant, placed

_LEAST = float(np.finfo(np.float32).min)


def spell_out_capped(model: ir.Model) -> int:
    """Put products and a softmax in the place of each capped attention of whole sequences. Returns how many."""
    graph, spelt = model.graph, 0
    for node in [one for one in graph if one.op_type == "Attention"]:
        if not (cap := node.attributes.get_float("softcap", 0.0)):
            continue
        found = _spelt(graph, node, cap)
        old = node.outputs[0]
        found.shape, found.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, found, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        found.name = name
        spelt += 1
    return spelt


def _spelt(graph: ir.Graph, node: ir.Node, cap: float) -> ir.Value:
    query, key, value, mask = (_known(one) for one in node.inputs[:4])
    assert query.shape is not None and key.shape is not None
    heads, groups, size = int(query.shape[1]), int(key.shape[1]), int(query.shape[3])  # type: ignore[arg-type]
    width = int(value.shape[3])  # type: ignore[index, arg-type]  # fixed by the model

    def then(kind: str, *inputs: ir.Value) -> ir.Value:
        return placed(graph, node, kind, list(inputs)).outputs[0]

    def number(name: str, one: float) -> ir.Value:
        return constant(graph, f"attention_{name}_{one:.9g}", np.array(one, dtype=np.float32))

    def shape(*sizes: int) -> ir.Value:
        return constant(graph, f"shape_{'_'.join(map(str, sizes))}", np.array(sizes, dtype=np.int64))

    axis = constant(graph, "axis_2", np.array([2], dtype=np.int64))
    query_NGRTD = then("Reshape", query, shape(0, groups, heads // groups, -1, size))
    turned = ir.Node("", "Transpose", [key], [ir.AttrInt64s("perm", [0, 1, 3, 2])], num_outputs=1)
    graph.insert_before(node, turned)
    score = then("MatMul", query_NGRTD, then("Unsqueeze", turned.outputs[0], axis))
    half = query.dtype not in (None, ir.DataType.FLOAT)
    if half:
        score = placed(graph, node, "Cast", [score], to=int(ir.DataType.FLOAT)).outputs[0]
    scale = node.attributes.get_float("scale", size**-0.5)
    capped = then("Mul", then("Tanh", then("Mul", score, number("over_cap", scale / cap))), number("cap", cap))
    seen_N11TT = then("Unsqueeze", mask, axis)
    scores = then("Where", seen_N11TT, capped, number("unseen", _LEAST))
    weights = placed(graph, node, "Softmax", [scores], axis=-1).outputs[0]
    if half:
        weights = placed(graph, node, "Cast", [weights], to=int(query.dtype or 0)).outputs[0]
    found_NGRTD = then("MatMul", weights, then("Unsqueeze", value, axis))
    return then("Reshape", found_NGRTD, shape(0, heads, -1, width))


def _known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
