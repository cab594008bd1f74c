"""An engine for the processor that rounds activations as they come, by how far that takes it from its graph.

Shapes: N windows, T tokens, V of what is said of each.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from stages.adapters.backends import Backend
from stages.compile.processor import describe, prose, said
from stages.graphs import components, ort_few_bits, ort_lowering, stepping
from stages.graphs.parity import divergence
from stages.runtime.contract import Metrics, StageError

LIMIT = 0.1
"""Nats a token, of KL(as the graph says || with rounded activations); or the difference over the length of an answer
that is no choice among classes."""
CHOOSING = frozenset({"generate", "fill", "translate", "classify", "tag"})
FINE = 2
"""Digits that are left of activations which are not to be rounded to one: with a scale for each row, sixteen bits."""
_NUMBER = re.compile(r"\d+")


def round_activations(chosen: Backend, source: Path, output: Path, fine: float) -> Metrics:
    """Let the proven engine round activations, and say how far that takes it from what it was.

    Args:
        chosen: the backend.
        source: the folder of the graph.
        output: that of the engine, which is written anew.
        fine: share of the INT8 weights whose activations keep sixteen bits, at most: of all layers' maps of a kind, or
            of none of them; those whose rounding moves the answers most for a weight.

    Raises:
        StageError: there is nothing to round, or the answers move too far.
    """
    engine, ids_NT = output / chosen.executable, prose(source)
    said_NT, task = said(describe(source), ids_NT), describe(source)["task"]

    def logits(path: Path) -> NDArray[np.float32]:
        return stepping.at_once(chosen.execute(path, (), True), ids_NT, said_NT)

    before_NTV = logits(engine)
    weights = _weights(engine)
    if fine and not weights:
        raise StageError(
            "`fine` is for INT8 weights that float activations meet, and the graph has none",
            measured=f"fine: {fine:g}",
            remedy="Leave `fine` out, or quantize by int8_weight_only.",
        )
    kept = _kept(engine, output, fine, weights, lambda path: _moved(task, before_NTV, logits(path)))
    models = components.load(engine)
    products = sum(ort_few_bits.round_activations(one) for one in models)
    products += sum(_rounded(one, lambda kind: FINE if kind in kept else 1) for one in models)
    if not products:
        raise StageError(
            "no activations can be rounded: the graph has no product of INT4 or INT8 weights and float activations",
            remedy="Leave `activations` out, or quantize by int4_weight_only or int8_weight_only.",
        )
    components.save(models, engine)
    measure = "rounding_kl_divergence" if task in CHOOSING else "rounding_relative_error"
    found = _moved(task, before_NTV, logits(engine))
    if not found <= LIMIT:
        raise StageError(
            "the engine answers otherwise once it rounds activations",
            measured=f"{measure.removeprefix('rounding_').replace('_', ' ')} {found:.3g}",
            limit=LIMIT,
            remedy="Leave `activations` out.",
        )
    metrics = {"rounded_activations": float(products), measure: found}
    return metrics | ({"fine_weights": sum(weights[kind] for kind in kept) / weights.total()} if fine else {})


def _moved(task: str, before_NTV: NDArray[np.float32], after_NTV: NDArray[np.float32]) -> float:
    """How far answers are from what they were, as LIMIT has it."""
    if task in CHOOSING:
        return divergence(before_NTV, after_NTV)
    return float(np.linalg.norm(after_NTV - before_NTV) / max(np.linalg.norm(before_NTV), np.finfo(np.float32).tiny))


def _weights(engine: Path) -> Counter[str]:
    """How many INT8 weights of each kind meet float activations."""
    weights = Counter[str]()
    for model in components.load(engine):
        for node in ort_lowering.split_products(model):
            value = node.inputs[1]
            assert value is not None and value.const_value is not None
            weights[_kind(str(value.name))] += value.const_value.size
    return weights


def _kept(
    engine: Path, output: Path, fine: float, weights: Counter[str], moved: Callable[[Path], float]
) -> frozenset[str]:
    """The kinds whose activations stay fine: each is rounded alone, and those that move the answers most go first."""
    damage = dict[str, float]()
    for kind in weights if fine else ():
        with tempfile.TemporaryDirectory(dir=output, prefix=".rounded-") as folder:
            models = components.load(engine)
            for model in models:
                _rounded(model, lambda one, alone=kind: 1 if one == alone else ort_lowering.DIGITS)  # type: ignore[misc]
            components.save(models, Path(folder) / engine.name)
            del models
            damage[kind] = moved(Path(folder) / engine.name)
    kept, left = list[str](), fine * weights.total()
    for kind in sorted(damage, key=lambda one: damage[one] / weights[one], reverse=True):
        if weights[kind] <= left:
            kept.append(kind)
            left -= weights[kind]
    return frozenset(kept)


def _rounded(model: ir.Model, digits: Callable[[str], int]) -> int:
    return ort_lowering.round_activations(model, lambda name: digits(_kind(name)))


def _kind(weights: str) -> str:
    """A name without the number of its layer: the same map of all of them."""
    return _NUMBER.sub("#", weights)
