"""A model in one graph or two: the second is an encoder, which stands beside what writes and shares its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from stages.adapters.backends import encoder_of
from stages.graphs import onnx_graph

ALIGNED = 4096
"""Bytes: a page, so that a runtime may map each tensor where it is."""
LEAST_BYTES = 1024
"""Vectors smaller than that stay in their graph, where shapes are computed from them."""


def files(graph: Path) -> list[Path]:
    """The file of a graph or of a plan, and its encoder's if it has one."""
    beside = encoder_of(graph)
    return [graph, beside] if beside.is_file() else [graph]


def load(graph: Path) -> list[ir.Model]:
    """The graphs of `files`; see `onnx_graph.load`."""
    return [onnx_graph.load(path) for path in files(graph)]


def save(models: Sequence[ir.Model], graph: Path) -> None:
    """Write what `load` gives; of two graphs the weights lie in `<graph>.data`, each tensor of a name once."""
    if len(models) == 1:
        onnx_graph.save(models[0], graph)
        return
    data = graph.with_name(f"{graph.name}.data")
    written = data.with_name(f".{data.name}")  # what is read may still lie in a file of this name
    known: dict[tuple[str, str, bytes], int] = {}
    moved: list[tuple[ir.Value, ir.ExternalTensor]] = []
    with written.open("wb") as stream:
        for value in (one for model in models for one in model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or (len(tensor.shape) < 2 and tensor.nbytes < LEAST_BYTES):
                continue
            raw = tensor.tobytes()
            key = str(value.name), f"{tensor.dtype} {tensor.shape}", hashlib.sha256(raw).digest()
            if key not in known:
                stream.write(bytes(-stream.tell() % ALIGNED))
                known[key] = stream.tell()
                stream.write(raw)
            place = ir.ExternalTensor(
                data.name,
                known[key],
                len(raw),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=key[0],
                base_dir=data.parent,
            )
            moved.append((value, place))
    written.replace(data)
    held = [value.const_value for value, _ in moved]
    for value, place in moved:
        value.const_value = place
    for model, path in zip(models, (graph, encoder_of(graph)), strict=True):
        ir.save(model, path)
    for (value, _), own in zip(moved, held, strict=True):  # they may outlive the folder
        value.const_value = own
