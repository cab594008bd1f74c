"""An engine for the processor, which is executed where it is built and proven against its graph.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stages.adapters.backends import Asked, Backend
from stages.graphs import components, onnx_graph, ort_checks, stepping, uncached
from stages.graphs.parity import prose_ids
from stages.runtime.contract import Metrics, Progress, StageError
from stages.runtime.progress import Silent
from stages.serving.answering import manner

GRAPH = "model.onnx"
PARITY_TOKENS = 64


def describe(source: Path) -> dict[str, Any]:
    """What a graph's folder says of it."""
    found: dict[str, Any] = json.loads((source / "graph.json").read_text(encoding="utf-8"))
    return found


@contextmanager
def without_cache(asked: Asked, output: Path) -> Iterator[Asked]:
    """The same, of a graph that reads whole sequences."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".whole-") as folder:
        model = onnx_graph.load(asked.graph)
        uncached.without_cache(model)
        onnx_graph.save(model, Path(folder) / GRAPH)
        del model
        yield replace(asked, graph=Path(folder) / GRAPH)


def build_proven(chosen: Backend, asked: Asked, source: Path, output: Path, progress: Progress) -> Metrics:
    """The engine, proven to compute what the graph computes."""
    described, ids_NT = describe(source), prose(source)
    said_NT = said(described, ids_NT)
    engine = output / chosen.executable
    metrics = chosen.build(asked, output, progress)
    if engine.suffix == asked.graph.suffix:
        require_lowered(onnx_graph.held(*components.load(engine)).precisions, described)
    progress.advanced(1, 3)

    def built(graph: Path, folder: Path) -> None:
        chosen.build(replace(asked, graph=graph), folder, Silent())

    def logits(folder: Path) -> np.ndarray:
        return stepping.at_once(chosen.execute(folder / chosen.executable, (), True), ids_NT, said_NT)

    def stepped(folder: Path) -> np.ndarray:
        return stepping.one_by_one(folder / chosen.executable, ids_NT, said_NT)

    difference = ort_checks.require_same_numbers(
        asked.graph,
        output,
        ids_NT,
        built,
        [logits, stepped] if described.get("cache") and chosen.keeps else [logits],
        predicts=described["task"] == "generate",
        said_NT=said_NT,
    )
    progress.advanced(2, 3)
    if engine.suffix == asked.graph.suffix:
        ort_checks.require_exact_products(engine, ids_NT, said_NT)
    progress.advanced(3, 3)
    return metrics | {"parity_logit_difference": difference}


def said(described: Mapping[str, Any], ids_NT: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """What a decoder behind an encoder reads when it is asked for windows; None for a model of one graph."""
    if "answers" not in described:
        return None
    return manner(described["answers"]).shifted(ids_NT, np.full(len(ids_NT), ids_NT.shape[1]))


def prose(source: Path) -> NDArray[np.int64]:
    """ids_NT of English, by the tokenizer in a graph's folder."""
    tokenizer, longest = Tokenizer.from_file(str(source / "tokenizer.json")), describe(source)["maximum_tokens"]
    return prose_ids(lambda text: list(tokenizer.encode(text).ids), 2, min(PARITY_TOKENS, longest))


def require_lowered(precisions: frozenset[str], described: Mapping[str, Any]) -> None:
    """Raise StageError where an engine has lost a number format of its graph."""
    lost = set(described["precisions"]) - precisions
    if lost:
        raise StageError(
            "the engine lost a number format of the graph",
            measured=", ".join(sorted(precisions)),
            limit=", ".join(described["precisions"]),
            remedy="Report it with graph.json.",
        )
