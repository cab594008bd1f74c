"""Products of INT4 weights as ONNX Runtime keeps them: half a byte each, unpacked as they are multiplied, in float.

Shapes: I inputs, O outputs, B blocks of b inputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from stages.graphs.ort_nodes import VENDOR, constant, placed

PRODUCT = "MatMulNBits"
IN_FLOAT, ROUNDED = 1, 4
"""The accuracy level that multiplies in fp32, as the graph says: one row of 2048^2 takes 0.37 ms instead of 0.66, 64
rows the same time. The faster level 4 (0.13 ms) rounds the activations, which no other engine of the graph does."""
_OFFSET = 8
"""The operator's own zero among the codes 0 to 15."""


def few_bits_product(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """A product of float activations and INT4 weights in blocks, placed before a MatMul; None: it is none."""
    weight = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
    if weight is None or weight.op_type != "DequantizeLinear" or weight.attributes.get_int("axis", 1) != 0:
        return None
    q, scale = weight.inputs[0], weight.inputs[1]
    size = weight.attributes.get_int("block_size", 0)
    if q is None or scale is None or q.const_value is None or scale.const_value is None:
        return None
    if q.const_value.dtype != ir.DataType.INT4 or size < 16 or size & (size - 1) or len(weight.inputs) > 2:
        return None
    q_IO = q.const_value.numpy().astype(np.int8)
    if q_IO.shape[0] % size:
        return None
    packed = constant(graph, f"{q.name}.packed", _packed(q_IO, size))
    scales = constant(graph, f"{scale.name}.rows", scale.const_value.numpy().T.astype(np.float32).ravel())
    sizes = {"K": q_IO.shape[0], "N": q_IO.shape[1], "bits": 4, "block_size": size, "accuracy_level": IN_FLOAT}
    return placed(graph, node, PRODUCT, [node.inputs[0], packed, scales], domain=VENDOR, **sizes)


def round_activations(model: ir.Model) -> int:
    """Let these products round their activations to INT8, a scale for each block. Returns how many there are."""
    found = [node for node in model.graph if node.op_type == PRODUCT]
    for node in found:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", ROUNDED)
    return len(found)


def _packed(q_IO: NDArray[np.int8], size: int) -> NDArray[np.uint8]:
    """[O, B, b / 2], the first of two in the low bits."""
    codes_OBb = (q_IO.T + _OFFSET).astype(np.uint8).reshape(q_IO.shape[1], -1, size)
    return np.bitwise_or(codes_OBb[..., 0::2], np.left_shift(codes_OBb[..., 1::2], np.uint8(4)), dtype=np.uint8)
