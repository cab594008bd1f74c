"""ONNX Runtime's norms that add what they norm: one pass over a residual stream instead of two."""

from __future__ import annotations

import onnx_ir as ir

from stages.graphs.ort_nodes import VENDOR

FUSED = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
_SUM, _OUTPUTS = 3, 4
"""The operators' place for the sum, behind the norm, a mean and a deviation that nobody reads."""


def fuse_norms(model: ir.Model) -> int:
    """Put one node in the place of each sum that is normed next. Returns how many."""
    graph, fused = model.graph, 0
    for norm in [node for node in graph if node.op_type in FUSED]:
        total = None if norm.inputs[0] is None else norm.inputs[0].producer()
        if total is None or total.op_type != "Add" or not _alike(total) or not _over_the_last(norm):
            continue
        attribute = ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))
        inputs = [*total.inputs, *norm.inputs[1:]]
        made = ir.Node(VENDOR, FUSED[norm.op_type], inputs, [attribute], num_outputs=_OUTPUTS)
        graph.insert_before(norm, made)
        olds, news = (norm.outputs[0], total.outputs[0]), (made.outputs[0], made.outputs[_SUM])
        for old, new in zip(olds, news, strict=True):
            new.shape, new.type, name = old.shape, old.type, old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name, new.name = None, name
        for unread in made.outputs[1:_SUM]:
            unread.name = ""
        graph.remove([norm, total], safe=True)
        fused += 1
    if fused:
        model.opset_imports[VENDOR] = 1
        graph.sort()
    return fused


def _alike(total: ir.Node) -> bool:
    """Whether two streams [N, T, H] are added, none of them spread over the other."""
    shapes = [None if value is None else value.shape for value in total.inputs]
    return shapes[0] is not None and len(shapes[0]) == 3 and shapes[0] == shapes[1]


def _over_the_last(norm: ir.Node) -> bool:
    return norm.attributes.get_int("axis", -1) in (-1, 2) and not any(one.uses() for one in norm.outputs[1:])
