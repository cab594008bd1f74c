"""Graphs as builders of plans get them: with a cache of a fixed length, or reading whole sequences.

A model with an encoder and a decoder is two plans: a step of the decoder would else compute the encoder, too.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from stages.adapters.backends import Asked, Backend, encoder_of
from stages.graphs import components, merged_products, onnx_graph, plan_checks, plan_constants, static_cache, uncached
from stages.runtime.contract import DoesNotFit, Metrics, Progress, StageError
from stages.runtime.progress import Pass

GRAPH = "model.onnx"
PREFILL, DECODE, READ = "prefill", "decode", "read"
"""The profiles of a plan with a cache, in their order; an encoder's."""


def build(chosen: Backend, asked: Asked, output: Path, progress: Progress) -> tuple[Metrics, bool]:
    """Build a plan from a graph that is made to its builder's needs.

    Returns:
        What the backend measured, and whether the plan keeps what it has read. Where its builder refuses the cache, a
        note says why and the plan reads whole sequences.

    Raises:
        StageError: the builder refuses the graph without its cache as well, or one of two graphs.
    """
    if len(components.files(asked.graph)) > 1:
        return _stacks(chosen, asked, output, progress), True
    model = _loaded(asked)
    cached = uncached.is_cached(model)
    asked = replace(asked, two_in_four=has_two_in_four(model))
    if cached and chosen.keeps:
        try:
            static_cache.with_places(model, asked.maximum_tokens)
            return _built(model, chosen, asked, output, progress), True
        except DoesNotFit:  # neither would the other
            raise
        except StageError as error:
            progress.note(f"the plan keeps nothing and reads the whole text again for each token: {error}")
        model = _loaded(asked)
    if cached:
        uncached.without_cache(model)
    return _built(model, chosen, asked, output, progress), False


def _loaded(asked: Asked) -> ir.Model:
    model = onnx_graph.load(asked.graph)
    merged_products.mend_shared(model)
    return model


def _built(model: ir.Model, chosen: Backend, asked: Asked, output: Path, progress: Progress) -> Metrics:
    metrics = _compiled(model, chosen, asked, output, progress)
    return metrics | plan_checks.measure([model], [output / chosen.executable], progress)


def _compiled(model: ir.Model, chosen: Backend, asked: Asked, output: Path, progress: Progress) -> Metrics:
    plan_constants.share(model)
    static_cache.name_by_modules(model)
    with tempfile.TemporaryDirectory(dir=output, prefix=".graph-") as folder:
        onnx_graph.save(model, Path(folder) / GRAPH)
        return chosen.build(replace(asked, graph=Path(folder) / GRAPH), output, progress)


def _stacks(chosen: Backend, asked: Asked, output: Path, progress: Progress) -> Metrics:
    """The plans of a decoder and of the encoder beside it."""
    metrics: Metrics = {}
    plan = output / chosen.executable
    models, paths = components.load(asked.graph), [plan, encoder_of(plan)]
    static_cache.with_places(models[0], asked.maximum_tokens)
    for place, (model, path) in enumerate(zip(models, paths, strict=True)):
        merged_products.mend_shared(model)
        part = replace(asked, two_in_four=has_two_in_four(model))
        with tempfile.TemporaryDirectory(dir=output, prefix=".plan-") as folder:
            metrics |= _compiled(model, chosen, part, Path(folder), Pass(progress, place, len(models)))
            (Path(folder) / chosen.executable).replace(path)
    return metrics | plan_checks.measure(models, paths, progress)


def profiles(maximum_batch: int, maximum_tokens: int, *, answers: bool = False) -> list[dict[str, object]]:
    """What `engine.json` says of the profiles of a plan with a cache; whether it `answers` what an encoder reads."""
    rows, text = [1, maximum_batch], {"text_tokens": [1, maximum_tokens]} if answers else {}
    names = ((PREFILL, maximum_tokens), (DECODE, 1))
    return [
        {"name": name, "number": number, "rows": rows, "new_tokens": [1, tokens], **text}
        for number, (name, tokens) in enumerate(names)
    ]


def reading_profiles(maximum_batch: int, maximum_tokens: int) -> list[dict[str, object]]:
    """The same of an encoder's plan."""
    return [{"name": READ, "number": 0, "rows": [1, maximum_batch], "text_tokens": [1, maximum_tokens]}]


def has_two_in_four(model: ir.Model) -> bool:
    """Whether a product's weights have two zeros in each four of their inputs."""
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        w_IO = _constant(node.inputs[1])
        # Its beginning says of nearly every matrix that it has not.
        if w_IO is not None and w_IO.ndim == 2 and len(w_IO) % 4 == 0 and _halved(w_IO[:4]) and _halved(w_IO):
            return True
    return False


def _halved(w_IO: np.ndarray) -> bool:
    return bool(((w_IO.reshape(len(w_IO) // 4, 4, -1) == 0).sum(1) >= 2).all())


def _constant(value: ir.Value) -> np.ndarray | None:
    """The numbers of a weight, behind a DequantizeLinear as it stands before it."""
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        return _constant(node.inputs[0])
    return None if value.const_value is None else value.const_value.numpy()
