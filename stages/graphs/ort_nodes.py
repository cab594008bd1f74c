"""Nodes and constants for graphs that ONNX Runtime alone reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

VENDOR = "com.microsoft"


def placed(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: list[ir.Value | None], *, domain: str = "", **attributes: int
) -> ir.Node:
    """A node with one output and attributes of integers, put before another."""
    typed = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    made = ir.Node(domain, kind, inputs, typed, num_outputs=1)
    graph.insert_before(before, made)
    return made


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer, made once under its name."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


def sweep(graph: ir.Graph) -> None:
    """Remove nodes and constants that nothing reads any more."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
