"""A proven graph written in 16-bit floats, and how far that takes it from the model.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.adapters.onnxruntime import open_session
from stages.export.called import OUTPUT
from stages.graphs import half_floats, onnx_graph, stepping
from stages.graphs.onnx_graph import Held
from stages.graphs.parity import divergence, parity
from stages.runtime.contract import Metrics, StageError

LIMITS = {"float16": 1e-3, "bfloat16": 1e-2}
"""Nats a token, of KL(the model in 32 bits || the graph): SmolLM2's are 1.4e-5 and 1.2e-4."""
DIFFERENCES = {"float16": 0.05, "bfloat16": 0.3}
"""Of an answer that predicts no token, over the root of its mean square."""


def halve(
    path: Path,
    dtype: Literal["float16", "bfloat16"],
    ids_NT: NDArray[np.int64],
    answer_N: NDArray[np.float32],
    *,
    predicts: bool,
) -> tuple[Held, Metrics]:
    """Write the graph anew and compare it with what the model answers, without the rounding of activations and caches.

    On a processor ONNX Runtime computes 16-bit floats in 32 bits, and has no bfloat16 at all: the graph is executed in
    32 bits with its weights as 16 hold them, and what goes from node to node in fp16 must stay below its end.

    Args:
        path: of the graph in 32 bits, proven.
        dtype: see `half_floats.halve`.
        ids_NT: windows.
        answer_N: the model's, in 32 bits.
        predicts: whether the answer is the next token of each.

    Raises:
        StageError: they differ by more than 16 bits explain.
    """
    model = onnx_graph.load(path)
    half_floats.halve(model, dtype)
    onnx_graph.save(model, path)
    held = onnx_graph.held(onnx_graph.load(path))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".parity-") as folder:
        twin = Path(folder) / path.name
        model = onnx_graph.load(path)
        onnx_graph.drop_rounding(model)
        onnx_graph.widen_fp4(model)
        half_floats.tell_reach(model)
        half_floats.in_floats(model)
        onnx_graph.save(model, twin)
        session = open_session(twin, literal=True)
        said = [stepping.outputs(session, ids_T[None]) for ids_T in ids_NT]
    found_N = np.concatenate([one[OUTPUT] for one in said])
    reach = max(float(one[half_floats.REACH]) for one in said)
    if dtype == "float16" and not reach < half_floats.MOST_IN_HALF:
        raise StageError(
            "the model's numbers leave what float16 holds",
            measured=f"{reach:.6g}",
            limit=half_floats.MOST_IN_HALF,
            remedy="Export in bf16, whose range is that of 32 bits.",
        )
    if predicts:
        measured, limit, unit = divergence(answer_N, found_N), LIMITS[dtype], "nats a token"
    else:
        measured, limit, unit = parity(None, answer_N, found_N).logit_difference, DIFFERENCES[dtype], "of its size"
    # Written so that a NaN fails.
    if not measured <= limit:
        raise StageError(
            f"the graph in {dtype} does not answer as the model does",
            measured=f"{measured:.3g} {unit}",
            limit=limit,
            remedy="Export in fp32.",
        )
    return held, {"halving_kl_divergence" if predicts else "halving_difference": measured}
