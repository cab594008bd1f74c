"""ONNX Runtime's attention over a cache in place of writing and attending: one operator that looks at what is there.

`Attention` reads every place that its cache has room for and masks what is empty; `GroupQueryAttention` stops at the
longest row, and writes new keys and values in its own pass where input and output are one buffer.

Shapes: N sequences, T new tokens, Q heads of queries, G of keys and values, D their size, M places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from stages.graphs.ort_nodes import VENDOR, constant, placed, sweep

CACHED_ATTENTION = "GroupQueryAttention"
MULTIPLE = 8
"""Of which the operator wants the size of a head to be one."""
_LENGTHS, _IDS = "past_lengths", "input_ids"


def lower_cache(model: ir.Model, layers: Sequence[Mapping[str, Any]]) -> int:
    """Rewrite the graph in place.

    Args:
        model: with a cache, see `stages.export.cached`.
        layers: what each keeps, as `graph.json` says it.

    Returns:
        How many layers attend so now; those whose pattern or sizes the operator has not stay as they are.
    """
    graph, lowered = model.graph, 0
    inputs = {one.name: one for one in graph.inputs}
    for node in [one for one in graph if one.op_type == "Attention"]:
        scatters = [_scatter(node.inputs[place]) for place in (1, 2)]
        if None in scatters:
            continue
        layer = layers[int(str(scatters[0].inputs[0].name).split(".")[1])]  # type: ignore[union-attr]
        if layer["window"] is None or layer["key_size"] != layer["value_size"] or layer["key_size"] % MULTIPLE:
            continue
        _replace(graph, node, scatters, layer, _reach(graph, inputs))  # type: ignore[arg-type]
        lowered += 1
    if lowered:
        model.opset_imports[VENDOR] = 1
        sweep(graph)
        graph.sort()
    return lowered


def _scatter(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "TensorScatter" else None


def _reach(graph: ir.Graph, inputs: Mapping[Any, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """The last place of each row once the new tokens are there, int32 [N], and the longest row's tokens, int32 []."""
    known = {value.name: value for node in graph for value in node.outputs}
    if "last_places" in known:
        return known["last_places"], known["longest_row"]
    first = next(iter(graph))
    shape = placed(graph, first, "Shape", [inputs[_IDS]], start=1, end=2).outputs[0]
    ends_N = placed(graph, first, "Add", [inputs[_LENGTHS], shape]).outputs[0]
    one = constant(graph, "one", np.array([1], dtype=np.int64))
    last_N = placed(graph, first, "Sub", [ends_N, one]).outputs[0]
    last = placed(graph, first, "Cast", [last_N], to=int(ir.DataType.INT32)).outputs[0]
    most = placed(graph, first, "ReduceMax", [ends_N], keepdims=0).outputs[0]
    longest = placed(graph, first, "Cast", [most], to=int(ir.DataType.INT32)).outputs[0]
    last.name, longest.name = "last_places", "longest_row"
    return last, longest


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    scatters: Sequence[ir.Node],
    layer: Mapping[str, Any],
    reach: tuple[ir.Value, ir.Value],
) -> None:
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    heads, size = int(query.shape[1]), int(layer["key_size"])  # type: ignore[arg-type]  # fixed by the model
    values = (query, scatters[0].inputs[1], scatters[1].inputs[1])
    rows = [_side_by_side(graph, node, value) for value in values]
    attributes = [
        ir.AttrInt64("num_heads", heads),
        ir.AttrInt64("kv_num_heads", int(layer["heads"])),
        ir.AttrFloat32("scale", node.attributes.get_float("scale", size**-0.5)),
    ]
    if layer["window"]:
        attributes.append(ir.AttrInt64("local_window_size", int(layer["window"])))
    if softcap := node.attributes.get_float("softcap", 0.0):
        attributes.append(ir.AttrFloat32("softcap", softcap))
    past = [one.inputs[0] for one in scatters]
    made = ir.Node(VENDOR, CACHED_ATTENTION, [*rows, *past, *reach], attributes, num_outputs=3)
    graph.insert_before(node, made)
    olds, news = [scatter.outputs[0] for scatter in scatters], list(made.outputs[1:])
    for old in _read_side_by_side(node.outputs[0], heads * size):
        olds.append(old)
        news.append(made.outputs[0])
    if any(user.op_type != "Transpose" for user, _ in node.outputs[0].uses()) or len(olds) == len(scatters):
        apart = constant(graph, f"{heads}_heads_of_{size}", np.array([0, 0, heads, size], dtype=np.int64))
        found = placed(graph, node, "Reshape", [made.outputs[0], apart]).outputs[0]
        olds.append(node.outputs[0])
        news.append(_turned(graph, node, found))
    for old, new in zip(olds, news, strict=True):
        new.shape, new.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, name


def _read_side_by_side(found: ir.Value, width: int) -> list[ir.Value]:
    """Where the heads of what attention found, [N, Q, T, D], are put side by side again, [N, T, Q * D]."""
    turned = [user.outputs[0] for user, _ in found.uses() if _turns(user)]
    readers = [user for value in turned for user, _ in value.uses()]
    joined = [user.outputs[0] for user in readers if user.op_type == "Reshape" and _is_rows(user.outputs[0], width)]
    return joined if len(joined) == len(readers) else []


def _side_by_side(graph: ir.Graph, before: ir.Node, value: ir.Value | None) -> ir.Value:
    """[N, G, T, D] -> [N, T, G * D], without taking apart what stood side by side before."""
    assert value is not None and value.shape is not None
    heads, size, node = int(value.shape[1]), int(value.shape[3]), value.producer()  # type: ignore[arg-type]
    if node is not None and node.op_type == "RotaryEmbedding":
        inner = _side_by_side(graph, before, node.inputs[0])
        attributes = [one for name, one in node.attributes.items() if name != "num_heads"]
        attributes.append(ir.AttrInt64("num_heads", heads))
        made = ir.Node("", node.op_type, [inner, *node.inputs[1:]], attributes, num_outputs=1)
        graph.insert_before(before, made)
        return made.outputs[0]
    apart = node.inputs[0] if node is not None and _turns(node) else None
    joined = None if apart is None else apart.producer()
    if joined is not None and joined.op_type == "Reshape" and _is_rows(joined.inputs[0], heads * size):
        assert joined.inputs[0] is not None
        return joined.inputs[0]
    flat = constant(graph, "heads_side_by_side", np.array([0, 0, -1], dtype=np.int64))
    return placed(graph, before, "Reshape", [apart or _turned(graph, before, value), flat]).outputs[0]


def _is_rows(value: ir.Value | None, width: int) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 3 and value.shape[2] == width


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [0, 2, 1, 3]


def _turned(graph: ir.Graph, before: ir.Node, value: ir.Value | None) -> ir.Value:
    """[N, G, T, D] <-> [N, T, G, D]."""
    turned = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", [0, 2, 1, 3])], num_outputs=1)
    graph.insert_before(before, turned)
    return turned.outputs[0]
