"""A graph with a cache as one that reads whole sequences, for backends that keep nothing.

Shapes: N sequences, T tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stages.graphs.ort_nodes import constant, placed, sweep
from stages.graphs.plain_attention import spell_out_capped

IDS, MASK, LENGTHS, ASKED, PAST = "input_ids", "attention_mask", "past_lengths", "logits_at", "past_key_values"
OPSET = 23
"""Enough once nothing is written into a cache."""


def is_cached(model: ir.Model) -> bool:
    """Whether a graph takes keys and values."""
    return any(str(one.name).startswith(PAST) for one in model.graph.inputs)


def without_cache(model: ir.Model) -> None:
    """Rewrite in place: inputs `input_ids` and `attention_mask`, logits of every token.

    Rows are padded on their right, where a decoder does not look; the mask is read for its shape alone.
    """
    graph = model.graph
    inputs = {str(one.name): one for one in graph.inputs}
    ids, past = inputs[IDS], [one for name, one in inputs.items() if name.startswith(PAST)]
    mask = ir.Value(name=MASK, shape=ids.shape, type=ids.type)
    first = next(iter(graph))
    column_N = placed(graph, first, "Gather", [mask, constant(graph, "first", np.array(0))], axis=1).outputs[0]
    none_N = placed(graph, first, "Mul", [column_N, constant(graph, "nothing", np.array(0))]).outputs[0]
    ir.convenience.replace_all_uses_with(inputs[LENGTHS], none_N)
    for node in list(graph):
        if node.op_type == "Shape" and node.inputs[0] in past:
            # Of a cache's rows and places, which are as many as there are tokens.
            axis = {0: 0, 2: 1}[node.attributes.get_int("start", 0)]
            size = placed(graph, node, "Shape", [ids], start=axis, end=axis + 1).outputs[0]
            ir.convenience.replace_all_uses_with(node.outputs[0], size)
        elif node.op_type == "TensorScatter":
            ir.convenience.replace_all_uses_with(node.outputs[0], _known(node.inputs[1]), replace_graph_outputs=True)
    for node in list(graph):
        if node.op_type == "GatherElements" and _comes_from(node.inputs[1], inputs[ASKED]):
            ir.convenience.replace_all_uses_with(node.outputs[0], _known(node.inputs[0]))
    del graph.outputs[1:]
    sweep(graph)
    del graph.inputs[1:]
    graph.inputs.append(mask)
    spell_out_capped(model)
    model.opset_imports[""] = OPSET


def _comes_from(value: ir.Value | None, source: ir.Value) -> bool:
    node = None if value is None else value.producer()
    return value is source or (node is not None and _comes_from(node.inputs[0], source))


def _known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
