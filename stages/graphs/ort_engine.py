"""A graph, or an encoder's and a decoder's, as ONNX Runtime's own operators compute it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.graphs import components, merged_products, ort_cache_lowering, ort_lowering, ort_norms
from stages.runtime.contract import Metrics

_KINDS = {
    "integer_products": ort_lowering.INTEGER_PRODUCT,
    "split_products": ort_lowering.SPLIT_PRODUCT,
    "few_bits_products": ort_lowering.FEW_BITS_PRODUCT,
}


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
    components.save(models, target)
    products = {name: float(lowered[kind]) for name, kind in _KINDS.items()} | {"merged_products": float(merged)}
    return products | ({"cached_attentions": float(attentions)} if layers else {})
