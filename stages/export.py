"""Turn a checkpoint into an ONNX graph with explicit Q/DQ and prove that it computes the same.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from stages.models.graph import Held

GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"
CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
           "special_tokens_map.json")  # fmt: skip
SLACK_BYTES = 1 << 20
"""Room for what a graph holds beyond the checkpoint's tensors: shapes, zero points, rotary frequencies."""


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
    from stages.models import exporting, graph
    from stages.models.loading import load_model

    source = inputs["model"]
    model = load_model(source)
    ids_NT = _windows(params, inputs, model.config.max_position_embeddings)
    reference_NTV = _logits(model, ids_NT)
    expected, vocabulary = _stored(model), model.config.vocab_size
    limits = {"maximum_tokens": model.config.max_position_embeddings, "vocabulary": vocabulary}
    progress.advanced(1, 4)
    exported = exporting.to_onnx(model, params.opset)
    del model
    progress.advanced(2, 4)
    graph.save(exported, output / GRAPH)
    del exported
    written = graph.held(graph.load(output / GRAPH))
    _require_effect(written, *expected)
    progress.advanced(3, 4)
    found = _parity(output / GRAPH, ids_NT, reference_NTV, rounded=written.rounds_activations)
    _carry(source, output)
    described = {
        "opset": params.opset,
        "inputs": list(exporting.INPUTS),
        "output": exporting.OUTPUT,
        "precisions": sorted(written.precisions),
        "rounds_activations": written.rounds_activations,
    } | limits
    (output / "graph.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
    progress.advanced(4, 4)
    return {
        "parity_logit_difference": found,
        "size_bytes": float(sum(path.stat().st_size for path in output.glob(f"{GRAPH}*"))),
        "nodes": float(written.nodes),
        "quantized_matrices": float(written.quantized.total()),
    }


def _windows(params: ExportParams, inputs: Mapping[str, Path], longest: int) -> NDArray[np.int64]:
    from stages.models.loading import load_tokenizer
    from stages.models.parity import prose_ids
    from stages.models.windows import windows

    tokenizer, tokens = load_tokenizer(inputs["model"]), min(params.parity_tokens, longest)
    if "text" not in inputs:
        return prose_ids(lambda text: tokenizer(text, verbose=False)["input_ids"], params.parity_windows, tokens)
    found: NDArray[np.int64] = windows(
        inputs["text"], "calibrate", tokenizer, tokens, most=params.parity_windows
    ).numpy()
    return found


def _carry(source: Path, output: Path) -> None:
    from stages.models.loading import load_tokenizer

    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if not (output / TOKENIZER).is_file():
        # The one file that engines read; checkpoints may bring the same in an older format.
        tokenizer = load_tokenizer(source)
        if not tokenizer.is_fast:
            raise StageError("the tokenizer cannot be written as tokenizer.json", measured=type(tokenizer).__name__)
        tokenizer.backend_tokenizer.save(str(output / TOKENIZER))


def _logits(model: PreTrainedModel, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        found: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids_NT), use_cache=False).logits.numpy()
    return found


def _stored(model: PreTrainedModel) -> tuple[dict[tuple[int, int], int], int]:
    """(bits, values) of each quantized weight -> how many, and the bytes of all tensors: each distinct one once."""
    from collections import Counter

    from stages.models.anatomy import named_tensors
    from stages.models.quantized import quantized_modules

    distinct = {id(tensor): tensor for _, tensor in named_tensors(model)}
    weights = {id(m.weight): (m.weight, getattr(m, "bits", 8)) for m in quantized_modules(model).values()}
    counts = Counter((bits, weight.numel() * 8 // bits) for weight, bits in weights.values())
    return dict(counts), sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def _require_effect(written: Held, quantized: Mapping[tuple[int, int], int], stored_bytes: int) -> None:
    """The graph holds each quantized weight as integers, and every tensor once."""
    if written.quantized != quantized:
        raise StageError(
            "the graph does not hold the checkpoint's quantized weights as integers",
            measured=f"{written.quantized.total()} tensors",
            limit=f"{sum(quantized.values())} tensors",
            remedy="Report it with the checkpoint's quantization.json.",
        )
    limit = stored_bytes + SLACK_BYTES
    if not stored_bytes * 0.99 <= written.size_bytes <= limit:
        raise StageError(
            "the graph's weights are not the checkpoint's",
            measured=f"{written.size_bytes} bytes",
            limit=f"{stored_bytes} to {limit} bytes",
            remedy="Report it: a tensor is stored twice or in another format.",
        )


def _parity(path: Path, ids_NT: NDArray[np.int64], reference_NTV: NDArray[np.float32], *, rounded: bool) -> float:
    """Compare graph and torch on whole windows and behind padding; returns the largest logit difference."""
    import numpy as np

    from stages.adapters.onnxruntime import open_session
    from stages.models.parity import parity, require_parity

    session = open_session(path, literal=True)
    whole = parity(ids_NT, reference_NTV, session.logits(ids_NT))
    require_parity(whole, rounded=rounded, what="the graph and the torch model")
    # A causal model says the same of the first half whatever follows; padding before it must not matter.
    half, pad = ids_NT.shape[1] // 2, 3
    ids_1T = np.concatenate([np.zeros((1, pad), np.int64), ids_NT[:1, :half]], axis=1)
    mask_1T = np.concatenate([np.zeros((1, pad), np.int64), np.ones((1, half), np.int64)], axis=1)
    padded = parity(ids_NT[:1, :half], reference_NTV[:1, :half], session.logits(ids_1T, mask_1T)[:, pad:])
    require_parity(padded, rounded=rounded, what="the padded graph and the torch model")
    return max(whole.logit_difference, padded.logit_difference)


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
