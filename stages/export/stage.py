"""Turn a checkpoint into an ONNX graph with explicit Q/DQ and prove that it computes the same.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAPH = "model.onnx"


class ExportParams(Params):
    """How the graph is written and checked.

    Attributes:
        opset: version of the ONNX operators. 23 has attention, rotary embedding and RMS norm as one operator each; 21
            is for older runtimes.
        parity_windows: windows of text on which graph and torch must agree.
        parity_tokens: their length.
    """

    opset: Literal[21, 23] = 23
    parity_windows: int = Field(2, ge=1)
    parity_tokens: int = Field(128, ge=16)


def export(params: ExportParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write `model.onnx` and `graph.json`, with the tokenizer beside them."""
    from stages.export import checks, to_onnx
    from stages.graphs import onnx_graph
    from stages.models.checkpoint.loading import load_model

    source = inputs["model"]
    model = load_model(source)
    to_onnx.densify(model)
    ids_NT = _windows(params, inputs, model.config.max_position_embeddings)
    wanted = checks.expected(model, ids_NT)
    limits = {"maximum_tokens": model.config.max_position_embeddings, "vocabulary": model.config.vocab_size}
    progress.advanced(1, 4)
    exported = to_onnx.to_onnx(model, params.opset)
    del model
    progress.advanced(2, 4)
    onnx_graph.save(exported, output / GRAPH)
    del exported
    written = onnx_graph.held(onnx_graph.load(output / GRAPH))
    checks.require_effect(written, wanted)
    progress.advanced(3, 4)
    difference = checks.require_numbers(output / GRAPH, ids_NT, wanted.logits_NTV)
    _carry(source, output)
    described = {
        "opset": params.opset,
        "inputs": list(to_onnx.INPUTS),
        "output": to_onnx.OUTPUT,
        "precisions": sorted(written.precisions),
        "rounded_products": len(written.rounding),
    } | limits
    (output / "graph.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
    progress.advanced(4, 4)
    return {
        "parity_logit_difference": difference,
        "size_bytes": float(sum(path.stat().st_size for path in output.glob(f"{GRAPH}*"))),
        "nodes": float(written.nodes),
        "quantized_matrices": float(written.quantized.total()),
    }


def _windows(params: ExportParams, inputs: Mapping[str, Path], longest: int) -> NDArray[np.int64]:
    from stages.graphs.parity import prose_ids
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.text.windows import windows

    tokenizer, tokens = load_tokenizer(inputs["model"]), min(params.parity_tokens, longest)
    if "text" not in inputs:
        return prose_ids(lambda text: tokenizer(text, verbose=False)["input_ids"], params.parity_windows, tokens)
    found: NDArray[np.int64] = windows(
        inputs["text"], "calibrate", tokenizer, tokens, most=params.parity_windows
    ).numpy()
    return found


def _carry(source: Path, output: Path) -> None:
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.serving.files import TOKENIZER, carry

    carry(source, output)
    if not (output / TOKENIZER).is_file():
        # The one file that engines read; checkpoints may bring the same in an older format.
        tokenizer = load_tokenizer(source)
        if not tokenizer.is_fast:
            raise StageError("the tokenizer cannot be written as tokenizer.json", measured=type(tokenizer).__name__)
        tokenizer.backend_tokenizer.save(str(output / TOKENIZER))


EXPORT = Stage(
    name="export",
    params=ExportParams,
    inputs={
        "model": Input(kinds=frozenset({Kind.CHECKPOINT})),
        "text": Input(kinds=frozenset({Kind.CORPUS}), optional=True),
    },
    output=Kind.ONNX,
    image=Image.TORCH,
    run=export,
)
