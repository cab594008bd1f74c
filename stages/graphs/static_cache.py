"""A graph whose cache has a fixed number of places, as TensorRT writes into one where it lies.

TensorRT's own operator for it (KVCacheUpdate) takes one length of the cache for all rows and calls, and gives back the
very buffer that it was given; rows and new tokens may be any number.

Shapes: N sequences, T new tokens, M places.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from stages.graphs.plain_attention import spell_out_capped
from stages.graphs.uncached import PAST

PRESENT = "present"
_PLACES = 2
"""The axis of the places."""


def with_places(model: ir.Model, places: int) -> None:
    """Fix M in place."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith((PAST, PRESENT)) and value.shape is not None:
            sizes = list(value.shape)
            sizes[_PLACES] = places
            value.shape = ir.Shape(sizes)
    spell_out_capped(model)


def name_by_modules(model: ir.Model) -> None:
    """Name nodes like `model.layers.3.mlp.up_proj/MatMul_57`, so that a builder's error says where it is.

    A node's weight says whose it is; the others stand behind such a one.
    """
    whose: dict[ir.Value | None, str] = {}
    weights: dict[ir.Value | None, str] = {}
    for number, node in enumerate(model.graph):
        given = [value for value in node.inputs if value is not None]
        weights |= {value: _module(value) for value in given if value.const_value is not None}
        own = [weights[value] for value in given if value in weights]
        before = [whose[value] for value in given if value in whose]
        module = max(own, key=len, default="") or max(before, key=_place, default="")
        # What is made of weights alone, as by a DequantizeLinear, is one.
        (weights if len(own) == len(given) else whose).update(dict.fromkeys(node.outputs, module))
        node.name = f"{module or 'model'}/{node.op_type}_{number}"


def _module(value: ir.Value) -> str:
    """`model.layers.3.mlp.up_proj` of `model.layers.3.mlp.up_proj.weight_scale`; nothing of a mere number."""
    return str(value.name).rpartition(".")[0]


def _place(module: str) -> list[int]:
    return [int(one) for one in re.findall(r"\.(\d+)(?=\.|$)", module)]
