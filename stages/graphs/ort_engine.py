"""A graph, or an encoder's and a decoder's, as ONNX Runtime's own operators compute it.

x86 without VNNI adds two products of UINT8 and INT8 in 16 bits, which saturate; those of UINT8 and UINT8 it adds in 32.
A session of ours turns the weights as it loads, see `stages.adapters.onnxruntime`; an engine that is built on such a
processor holds them unsigned, so that it is right in the session of any program, on any processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from stages.adapters.onnxruntime import has_exact_kernels
from stages.graphs import components, merged_products, ort_cache_lowering, ort_lowering, ort_norms
from stages.graphs.ort_nodes import constant, placed, sweep
from stages.runtime.contract import Metrics

_KINDS = {
    "integer_products": ort_lowering.INTEGER_PRODUCT,
    "split_products": ort_lowering.SPLIT_PRODUCT,
    "few_bits_products": ort_lowering.FEW_BITS_PRODUCT,
}

_ZERO = 5
"""Place of the weights' zero among the inputs of a product."""
_TOP_BIT = 0x80
"""Turning it adds 128 to a number of eight bits."""


def lower(graph: Path, target: Path, layers: Sequence[Mapping[str, Any]]) -> Metrics:
    """Write an engine of a graph.

    Args:
        graph: model.onnx.
        target: where the engine goes.
        layers: what each keeps, as `graph.json` says it.

    Returns:
        How many products and attentions are the runtime's own.
    """
    models, attentions, merged = components.load(graph), 0, 0
    lowered: Counter[str] = Counter()
    for model in models:
        merged += merged_products.merge_products(model)
        lowered += Counter(ort_lowering.lower(model))
        attentions += ort_cache_lowering.lower_cache(model, layers)
        ort_norms.fuse_norms(model)
        if not has_exact_kernels():
            _make_weights_unsigned(model)
    components.save(models, target)
    products = {name: float(lowered[kind]) for name, kind in _KINDS.items()} | {"merged_products": float(merged)}
    return products | ({"cached_attentions": float(attentions)} if layers else {})


def _make_weights_unsigned(model: ir.Model) -> None:
    """Rewrite the graph in place: the same grid, with its zero at 128."""
    graph, turned = model.graph, dict[ir.Value, ir.Value]()
    products = [node for node in graph if node.op_type == ort_lowering.INTEGER_PRODUCT and len(node.inputs) <= _ZERO]
    for node in products:
        weights = node.inputs[1]
        assert weights is not None
        if weights not in turned:
            turned[weights] = _unsigned(graph, node, weights)
        node.replace_input_with(1, turned[weights])
        node.resize_inputs(_ZERO + 1)
        node.replace_input_with(_ZERO, ort_lowering.unsigned_zero(graph))
    if products:
        sweep(graph)


def _unsigned(graph: ir.Graph, before: ir.Node, weights: ir.Value) -> ir.Value:
    if weights.const_value is not None:
        name, signed = str(weights.name), weights.const_value.numpy()
        if all(user.op_type == ort_lowering.INTEGER_PRODUCT for user, _ in weights.uses()):
            del graph.initializers[name]
        else:  # it is read as it is, too
            name += "_unsigned"
        return constant(graph, name, signed.view(np.uint8) ^ _TOP_BIT)
    # A table of tokens that is the head as well stays one table: the runtime turns it when it loads.
    top_bit = constant(graph, "top_bit", np.array(_TOP_BIT, np.uint8))
    same_bits = placed(graph, before, "Cast", [weights], to=int(ir.DataType.UINT8))
    return placed(graph, before, "BitwiseXor", [same_bits.outputs[0], top_bit]).outputs[0]
