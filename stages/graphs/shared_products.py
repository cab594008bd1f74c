"""Products of quantized weights that blocks share, as TensorRT-RTX 1.7 can build them.

It joins products of the same activations into one by itself, and ends in an error of its own, or a crash, where the
weights of one of them are used again elsewhere, beside others. So those that stand beside each other everywhere are
merged before, and of the rest each reads its activations turned, [T, N, I], by which it no longer is beside them.
"""

from __future__ import annotations

import onnx_ir as ir

from stages.graphs.merged_products import SHARED, merge_products, readers

_TURN = [1, 0, 2]


def mend_shared(model: ir.Model) -> int:
    """Rewrite the graph in place. Returns how many products are others now."""
    graph, changed = model.graph, merge_products(model, shared=True)
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "MatMul" else None
        weight = None if x is None or node.inputs[1] is None else node.inputs[1].producer()
        if x is None or weight is None or weight.op_type != "DequantizeLinear" or not _is_rows(x):
            continue
        beside = [user for user, place in x.uses() if (user.op_type, place) == ("MatMul", 0)]
        if len(readers(weight.outputs[0]) or ()) < SHARED or len(beside) < SHARED:
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
