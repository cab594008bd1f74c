"""Products of quantized weights that read the same activations as one.

Queries, keys and values, or gate and up, become one product with their weights side by side, whose result is split:
a token's time goes into as many calls as there are. Each number is the same sum as before.

Products of weights that blocks share are written as TensorRT-RTX 1.7 can build them. It joins products of the same
activations into one by itself, and ends in an error of its own, or a crash, where the weights of one of them are used
again elsewhere, beside others. So those that stand beside each other everywhere are merged before, and of the rest
each reads its activations turned, [T, N, I], by which it no longer is beside them.

Shapes: N sequences, T tokens, I inputs, O outputs, B blocks of inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as ir

from stages.graphs.ort_nodes import constant, sweep

INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.INT4})
_SHARED = 2
"""Activations that weights multiply which blocks share."""
_TURN = [1, 0, 2]


def merge_products(model: ir.Model, *, shared: bool = False) -> int:
    """Rewrite the graph in place. Returns how many products went into others.

    Args:
        model: before its products of integers are written for one runtime.
        shared: only those whose weights several blocks share.
    """
    graph, groups = model.graph, defaultdict[Hashable, list[ir.Node]](list)
    for node in graph:
        if node.op_type != "MatMul" or (weight := _integers(node.inputs[1])) is None:
            continue
        reading = _readers(weight.outputs[0])
        if reading is not None and not (shared and len(reading) < _SHARED):
            groups[node.inputs[0], reading, _kind(weight)].append(node)
    merged = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in merged:
        _merge(graph, nodes)
    if merged:
        sweep(graph)
    return sum(len(nodes) - 1 for nodes in merged)


def _readers(weight: ir.Value) -> frozenset[ir.Value | None] | None:
    """The activations that a weight multiplies: with others that multiply the same it goes into one, there once.

    None where something else reads it.
    """
    uses = weight.uses()
    found = frozenset(user.inputs[0] for user, place in uses if (user.op_type, place) == ("MatMul", 1))
    return found if len(found) == len(uses) else None


def _integers(value: ir.Value | None) -> ir.Node | None:
    """What dequantizes constant integers [I, O], by columns or by blocks of rows of them."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
        return None
    q, scale = (None if one is None else one.const_value for one in node.inputs)
    if q is None or scale is None or q.dtype not in INTEGERS or len(q.shape) != 2:
        return None
    by_columns = len(scale.shape) == 1 and node.attributes.get_int("axis", 1) == 1
    in_blocks = len(scale.shape) == 2 and node.attributes.get_int("axis", 1) == 0
    return node if by_columns or in_blocks else None


def _kind(weight: ir.Node) -> Hashable:
    q, scale = (one.const_value for one in weight.inputs if one is not None)
    assert q is not None and scale is not None
    return q.dtype, q.shape[0], len(scale.shape), scale.dtype, weight.attributes.get_int("block_size", 0)


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first, weights = nodes[0], [node.inputs[1].producer() for node in nodes]  # type: ignore[union-attr]
    assert weights[0] is not None
    q = _side_by_side(graph, [weight.inputs[0] for weight in weights])  # type: ignore[union-attr]
    scale = _side_by_side(graph, [weight.inputs[1] for weight in weights])  # type: ignore[union-attr]
    whole = ir.Node("", "DequantizeLinear", [q, scale], [*weights[0].attributes.values()], num_outputs=1)
    product = ir.Node("", "MatMul", [first.inputs[0], whole.outputs[0]], num_outputs=1)
    olds = [node.outputs[0] for node in nodes]
    widths = np.array([_array(node.inputs[1].producer().inputs[0]).shape[1] for node in nodes])  # type: ignore[union-attr]
    name = f"widths_{'_'.join(str(one) for one in widths)}"
    split = ir.Node("", "Split", [product.outputs[0], constant(graph, name, widths)], num_outputs=len(olds))
    split.attributes["axis"] = ir.AttrInt64("axis", -1)
    graph.insert_before(first, [whole, product, split])
    for old, new in zip(olds, split.outputs, strict=True):
        new.shape, new.type, named = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, named
    shape = olds[0].shape
    if shape is not None:
        product.outputs[0].shape = ir.Shape([*shape[:-1], int(widths.sum())])
    product.outputs[0].type = olds[0].type
    graph.remove(nodes, safe=True)


def _side_by_side(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    arrays = [_array(value) for value in values]
    return constant(graph, "+".join(str(value.name) for value in values if value), np.concatenate(arrays, axis=-1))


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    found: np.ndarray = value.const_value.numpy()
    return found


def mend_shared(model: ir.Model) -> int:
    """Rewrite the graph in place. Returns how many products are others now."""
    graph, changed = model.graph, merge_products(model, shared=True)
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "MatMul" else None
        weight = None if x is None or node.inputs[1] is None else node.inputs[1].producer()
        if x is None or weight is None or weight.op_type != "DequantizeLinear" or not _is_rows(x):
            continue
        beside = [user for user, place in x.uses() if (user.op_type, place) == ("MatMul", 0)]
        if len(_readers(weight.outputs[0]) or ()) < _SHARED or len(beside) < _SHARED:
            continue
        turned = _turned(x)
        product = ir.Node("", "MatMul", [turned.outputs[0], node.inputs[1]], num_outputs=1)
        back = _turned(product.outputs[0])
        graph.insert_before(node, [turned, product, back])
        old, new = node.outputs[0], back.outputs[0]
        new.shape, new.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name
        changed += 1
    return changed


def _turned(value: ir.Value) -> ir.Node:
    return ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _TURN)], num_outputs=1)


def _is_rows(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == len(_TURN)
