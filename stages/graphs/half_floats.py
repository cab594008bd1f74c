"""A proven graph with 16-bit floats in place of 32-bit ones, as TensorRT's strongly typed networks take it.

What torch computes in 32 bits in a 16-bit model stays so: rotations from positions, the inner sums of norms, softmax.
Logits come out in 32 bits. Keys and values are kept in 16.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from stages.graphs.ort_nodes import sweep

TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_ARRAYS = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
WIDE = frozenset(
    {"Pow", "ReduceMean", "ReduceSum", "ReduceL2", "Sqrt", "Reciprocal", "Exp", "Log", "Softmax", "Softplus", "CumSum"}
)
"""Operators whose values leave what 16 bits hold, or are sums of many: they are fed and read in 32."""
_SUMS = {"ReduceSum", "ReduceMean"}
_REACHING = frozenset(
    {"Add", "Sub", "Mul", "MatMul", "Gemm", "Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding"}
)
REACH, MOST_IN_HALF = "reach", 65520.0
"""An output of `tell_reach`; from here on float16 is infinite."""
_SCALES = {("QuantizeLinear", 1), ("DequantizeLinear", 1)}
_SMALLEST = 2.0**-14
"""From here down a 16-bit scale loses digits."""


def halve(model: ir.Model, dtype: str) -> None:
    """Rewrite the graph in place.

    Args:
        model: in 32 bits, proven.
        dtype: `float16` or `bfloat16`.
    """
    graph, rewriting = model.graph, _Rewriting(model.graph, TYPES[dtype])
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = rewriting.half
            rewriting.halves.add(value)
    wide = _wide(graph) | {
        node for node in graph if node.op_type == "QuantizeLinear" and rewriting.loses(node.inputs[1])
    }
    for node in list(graph):
        rewriting.feed(node, wide=node in wide)
        if node not in wide and _says_floats(node):
            rewriting.retype(node)
    _wide_logits(graph, rewriting.halves)
    sweep(graph)
    rewriting.name_as_before()


class _Rewriting:
    """A graph on its way to 16 bits: which values are there, and what was made for them."""

    def __init__(self, graph: ir.Graph, half: ir.DataType) -> None:
        self.graph, self.half = graph, half
        self.halves: set[ir.Value] = set()
        self._constants: dict[ir.Value, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def feed(self, node: ir.Node, *, wide: bool) -> None:
        """Give a node its floats in 16 bits, or in 32 where it stays `wide`."""
        for place, value in enumerate(node.inputs):
            if value is None or not (value in self.halves or _is_float(value)):
                continue
            if value in self.graph.initializers.values():
                if not wide and not ((node.op_type, place) in _SCALES and self.loses(value)):
                    node.replace_input_with(place, self._constant(value))
            elif (node.op_type, place) in _SCALES:
                continue  # scales of scales are as they are computed, and what they scale is of their type
            elif wide == (value in self.halves):
                node.replace_input_with(place, self._cast(node, value, ir.DataType.FLOAT if wide else self.half))

    def retype(self, node: ir.Node) -> None:
        """Say that a node's floats are of 16 bits."""
        scale = node.inputs[1] if node.op_type == "DequantizeLinear" else None
        if scale is not None and scale.dtype == ir.DataType.FLOAT:
            return  # what it says is cast where it is read
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(ir.DataType.FLOAT):
            node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        for value in node.outputs:
            if value.dtype in (ir.DataType.FLOAT, None):
                value.dtype = self.half
                self.halves.add(value)

    def name_as_before(self) -> None:
        """Give constants the names of those in 32 bits that nothing reads any more."""
        held = self.graph.initializers
        for before, made in self._constants.items():
            if before.name not in held and made.name in held:
                del held[str(made.name)]
                made.name = before.name
                self.graph.register_initializer(made)

    def loses(self, scale: ir.Value | None) -> bool:
        """Whether a scale loses digits in 16 bits."""
        if scale is None or scale.const_value is None:
            return False
        return self.half == ir.DataType.FLOAT16 and float(np.abs(scale.const_value.numpy()).min()) < _SMALLEST

    def _constant(self, value: ir.Value) -> ir.Value:
        if value not in self._constants:
            assert value.const_value is not None
            limit, name = float(ml_dtypes.finfo(_ARRAYS[self.half]).max), f"{value.name}.half"
            array = np.clip(value.const_value.numpy(), -limit, limit).astype(_ARRAYS[self.half])
            made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            made.shape, made.dtype = value.shape, self.half
            self.graph.register_initializer(made)
            self._constants[value] = made
        return self._constants[value]

    def _cast(self, before: ir.Node, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self._casts:
            made = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], num_outputs=1)
            made.outputs[0].shape, made.outputs[0].dtype = value.shape, to
            self.graph.insert_before(before, made)
            self._casts[value, to] = made.outputs[0]
        return self._casts[value, to]


def tell_reach(model: ir.Model) -> None:
    """Give as a further output of a halved graph the largest magnitude of what its nodes hand on in 16 bits.

    Scores that a softmax alone reads are left out: those of places that nobody sees may be infinite.
    """
    graph, largest = model.graph, list[ir.Value | None]()
    for node in list(graph):
        value = node.outputs[0]
        if node.op_type not in _REACHING or value.dtype not in _ARRAYS or _is_score(value):
            continue
        size = ir.Node("", "Abs", [value], num_outputs=1)
        most = ir.Node("", "ReduceMax", [size.outputs[0]], [ir.AttrInt64("keepdims", 0)], num_outputs=1)
        graph.extend([size, most])
        largest.append(most.outputs[0])
    reach = ir.Node("", "Max", largest, num_outputs=1)
    graph.append(reach)
    value = reach.outputs[0]
    value.name, value.dtype, value.shape = REACH, ir.DataType.FLOAT, ir.Shape([])
    graph.outputs.append(value)


def _is_score(value: ir.Value) -> bool:
    users = [user for user, _ in value.uses()]
    casts = [user.outputs[0] for user in users if user.op_type == "Cast"]
    users = [user for user in users if user.op_type != "Cast"] + [user for cast in casts for user, _ in cast.uses()]
    return bool(users) and all(user.op_type == "Softmax" for user in users)


def in_floats(model: ir.Model) -> None:
    """Rewrite a halved graph in place to compute in 32 bits with the weights as 16 bits hold them."""
    for value in model.graph.initializers.values():
        if value.dtype in _ARRAYS and value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value, value.dtype = ir.tensor(array, name=value.name), ir.DataType.FLOAT
    for value in (*model.graph.inputs, *model.graph.outputs, *(one for node in model.graph for one in node.outputs)):
        if value.dtype in _ARRAYS:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        if node.op_type == "Cast" and ir.DataType(node.attributes.get_int("to", 0)) in _ARRAYS:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))


def _wide(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that stay in 32 bits: WIDE ones, and what is computed of positions or masks and constants alone."""
    found: set[ir.Node] = set()
    of_numbers: set[ir.Value] = set()
    for node in graph:
        to_float = node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(ir.DataType.FLOAT)
        given = [value for value in node.inputs if value is not None]
        if to_float and given[0].dtype not in (ir.DataType.FLOAT, *_ARRAYS):
            inner = True
        else:
            moving = [one for one in given if one.const_value is None and one not in of_numbers]
            inner = any(one in of_numbers for one in given) and not moving
        if inner:
            of_numbers.update(node.outputs)
        makers = {made.op_type for one in given if (made := one.producer()) is not None}
        summed = node.op_type in ("Add", "Div") and bool(makers & _SUMS)  # before a sum of many is small again
        if inner or summed or node.op_type in WIDE:
            found.add(node)
    return found


def _is_float(value: ir.Value) -> bool:
    # The exporter leaves some values without a type: they are what their producer's inputs are.
    node = value.producer()
    return value.dtype == ir.DataType.FLOAT or (value.dtype is None and node is not None and _says_floats(node))


def _says_floats(node: ir.Node) -> bool:
    if node.outputs[0].dtype is not None:
        return node.outputs[0].dtype == ir.DataType.FLOAT
    return any(
        value is not None and (value.dtype == ir.DataType.FLOAT or value.dtype in _ARRAYS) for value in node.inputs
    )


def _wide_logits(graph: ir.Graph, is_half: Iterable[ir.Value]) -> None:
    """Let the first output, which is read by programs, come out in 32 bits."""
    logits = graph.outputs[0]
    if logits not in set(is_half):
        return
    node, name = ir.Node("", "Cast", [logits], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1), logits.name
    graph.append(node)
    node.outputs[0].shape, node.outputs[0].dtype = logits.shape, ir.DataType.FLOAT
    graph.outputs[0] = node.outputs[0]
    logits.name, node.outputs[0].name = f"{name}.half", name
