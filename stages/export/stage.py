"""Turn a checkpoint into an ONNX graph with explicit Q/DQ and prove that it computes the same.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.runtime.contract import Image, Input, Kind, Metrics, Params, Progress, Stage, StageError
from stages.runtime.progress import Silent

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from stages.export.cached import LayerCache
    from stages.export.checks import Expected
    from stages.graphs.onnx_graph import Held
    from stages.models.checkpoint.subject import Subject

GRAPH = "model.onnx"
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention")
"""What configurations call the tokens that a layer attends to at most."""
BEYOND_WINDOW = 16
HALVES: Mapping[str, Literal["float16", "bfloat16"]] = {"fp16": "float16", "bf16": "bfloat16"}
"""`dtype` -> what a graph calls it."""
WHOLE = "float32"
_NOTHING_KEPT = "engines read the whole text again for each token, as no graph keeps what it has read"


class ExportParams(Params):
    """How the graph is written and checked.

    Attributes:
        opset: version of the ONNX operators. 23 has attention, rotary embedding and RMS norm as one operator each; 21
            is for older runtimes. A graph with a cache is written in 24.
        cache: a model that continues texts takes and gives the keys and values of what it has read, so that a new token
            costs what it is, not all before it. Backends without a cache are given the same graph without.
        dtype: of the numbers that are not quantized: activations, keys and values, norms. 16 bits are for TensorRT's
            plans, `bf16` from sm_80 on; the graph is proven in 32 bits first; then it is measured how far
            16 take it.
        parity_windows: windows of text on which graph and torch must agree.
        parity_tokens: their length; they are longer where layers attend to so many tokens at most.
    """

    opset: Literal[21, 23] = 23
    cache: bool = True
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    parity_windows: int = Field(2, ge=1)
    parity_tokens: int = Field(128, ge=16)


def export(params: ExportParams, inputs: Mapping[str, Path], output: Path, progress: Progress) -> Metrics:
    """Write `model.onnx` and `graph.json`, with the tokenizer beside them; and `encoder.onnx` if there is one."""
    from stages.export import called, checks, positions, stacked, to_onnx, told
    from stages.models.anatomy import classes, tasks
    from stages.models.checkpoint.loading import load_config, load_tokenizer
    from stages.models.checkpoint.pooling import pooled, reads

    source, config, tokenizer = inputs["model"], load_config(inputs["model"]), load_tokenizer(inputs["model"])
    task, most, pool = tasks.task(config), reads(source, config), pooled(source)
    if config.is_encoder_decoder:
        stacked.refuse_unwritten(
            classes.model_class(config), task, params.opset, cache=params.cache, whole=params.dtype not in HALVES
        )
    most = _longest(config, tokenizer, progress) if most is None else told.longest(most, config, progress)
    ids_NT = _windows(inputs, tokenizer, params.parity_windows, _parity_tokens(params, config, most))
    model = _dense(source)
    segments = tasks.tells_segments(config, tokenizer.model_input_names)
    wanted = checks.expected(model, ids_NT, task, pool, tells_segments=segments)
    positions.hold_frequencies(model)
    progress.advanced(1, 4)
    if config.is_encoder_decoder:
        written, difference, signature = stacked.export_stacks(model, output / GRAPH, wanted, ids_NT, most)
    else:
        layers = _layers(model, params, progress) if task == "generate" and params.cache else ()
        made = _with_cache(model, layers, output, wanted, ids_NT, progress) if layers else None
        if made is None:
            if layers:  # it was laid out for the exporter
                model, layers = _dense(source), ()
                positions.hold_frequencies(model)
            exported = to_onnx.to_onnx(model, params.opset, task, ids_NT[:1], pool, tells_segments=segments)
            del model
            made = _written(exported, output, wanted), checks.require_numbers(output / GRAPH, ids_NT, wanted, task)
        whole = called.inputs_of(tells_segments=segments)
        (written, difference), signature = made, _signature(layers, most, HALVES.get(params.dtype, WHOLE), whole)
    halving: Metrics = {}
    if half := HALVES.get(params.dtype):
        from stages.export.halving import halve

        written, halving = halve(output / GRAPH, half, ids_NT, wanted.answer_N, predicts=task == "generate")
    progress.advanced(3, 4)
    _carry(source, output)
    told.settings(output, task, progress)
    described = signature | {
        "opset": written.opset,
        "dtype": half or WHOLE,
        "task": task,
        "precisions": sorted(written.precisions),
        "rounded_products": len(written.rounding),
        "maximum_tokens": most,
        "vocabulary": config.get_text_config().vocab_size,
        "pooling": None if pool is None else pool.described(),
    }
    (output / "graph.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
    progress.advanced(4, 4)
    return {
        "parity_logit_difference": difference,
        "size_bytes": float(sum(path.stat().st_size for path in output.glob("*.onnx*"))),
        "nodes": float(written.nodes),
        "quantized_matrices": float(written.quantized.total()),
    } | halving


def _dense(source: Path) -> PreTrainedModel:
    from stages.export.to_onnx import densify
    from stages.models.checkpoint.loading import load_model

    model = load_model(source)
    densify(model)
    return model


def _layers(model: PreTrainedModel, params: ExportParams, progress: Progress) -> Sequence[LayerCache]:
    """What each layer keeps of what it has read; nothing, with a note, where that cannot be in a graph."""
    from stages.export import cached, to_onnx
    from stages.export.layer_caches import layer_caches

    try:
        if params.opset < to_onnx.FUSED_ATTENTION:
            raise cached.NotCached(f"opset {params.opset} has no operator for attention")
        return layer_caches(model, max([0, *_windows_of(model.config)]) + BEYOND_WINDOW)
    except cached.NotCached as reason:
        progress.note(f"{_NOTHING_KEPT}: {reason}")
        return ()


def _with_cache(
    model: PreTrainedModel,
    layers: Sequence[LayerCache],
    output: Path,
    wanted: Expected,
    ids_NT: NDArray[np.int64],
    progress: Progress,
) -> tuple[Held, float] | None:
    """The graph that keeps what it has read, written and proven; None and a note where the model allows none."""
    from stages.export import cached, to_onnx
    from stages.export.cache_checks import require_kept_numbers

    try:
        written = _written(to_onnx.with_cache(model, layers), output, wanted)
        return written, require_kept_numbers(output / GRAPH, ids_NT, wanted.answer_N)
    except cached.NotCached as reason:
        progress.note(f"{_NOTHING_KEPT}: {reason}")
    except StageError as reason:
        # Falcon rounds its slopes in one of its two ways of attention and not in the other.
        if not cached.has_own_attention(model):
            raise
        progress.note(f"{_NOTHING_KEPT}: {reason}")
    return None


def _written(exported: ir.Model, output: Path, wanted: Expected) -> Held:
    from stages.export.checks import require_effect
    from stages.graphs import onnx_graph

    onnx_graph.save(exported, output / GRAPH)
    written = onnx_graph.held(onnx_graph.load(output / GRAPH))
    require_effect(written, wanted)
    return written


def _signature(layers: Sequence[LayerCache], most: int, dtype: str, whole: list[str]) -> dict[str, Any]:
    from stages.export import cached, called

    if not layers:
        component = {"file": GRAPH, "inputs": whole, "outputs": [called.OUTPUT], "state": {}}
        return {"components": {"model": component}, "cache": None}
    inputs, outputs, state = cached.names(len(layers))
    component = {"file": GRAPH, "inputs": inputs, "outputs": outputs, "state": state}
    kept = {"dtype": dtype, "maximum": most, "layers": [layer.described() for layer in layers]}
    return {"components": {"model": component}, "cache": kept}


def admit(params: ExportParams, known: Mapping[str, Any]) -> Subject:
    """The graph of a checkpoint."""
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.models.checkpoint.pooling import pooled
    from stages.models.text.windows import check_split

    check_split(known, "calibrate")
    given: Subject = known["model"]
    pooled(given.folder)
    if given.model.config.is_encoder_decoder:
        from stages.export.stacked import refuse_unwritten

        refuse_unwritten(
            type(given.model), given.task, params.opset, cache=params.cache, whole=params.dtype not in HALVES
        )
    if given.scheme in ("nvfp4", "mxfp4"):
        from stages.export.to_onnx import FOUR_BIT_FLOATS, no_four_bit_floats

        if params.opset < FOUR_BIT_FLOATS:
            raise no_four_bit_floats(params.opset, f"the scheme {given.scheme}")
    given = replace(given, dtype=HALVES.get(params.dtype, WHOLE))
    if given.reads is not None or given.folder.is_file():
        return replace(given, built=given.reads)
    return replace(given, built=_longest(given.model.config, load_tokenizer(given.folder), Silent()))


def _longest(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> int:
    from stages.models.anatomy.tasks import longest, longest_text

    if (most := longest(config)) is not None:
        return most
    said = tokenizer.model_max_length
    most = longest_text(said)
    why = "its tokenizer's longest text" if most == said else "a length for want of another"
    progress.note(f"the model's positions have no end: engines read {most} tokens, {why}")
    return most


def _parity_tokens(params: ExportParams, config: PreTrainedConfig, most: int) -> int:
    """Longer than the tokens that a layer attends to at most: a graph that forgets that must not pass."""
    beyond = [window + BEYOND_WINDOW for window in _windows_of(config) if window < most]
    return min(most, max([params.parity_tokens, *beyond]))


def _windows_of(config: PreTrainedConfig) -> list[int]:
    return [getattr(config.get_text_config(), name, None) or 0 for name in WINDOWS]


def _windows(
    inputs: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, count: int, tokens: int
) -> NDArray[np.int64]:
    from stages.graphs.parity import prose_ids
    from stages.models.text.windows import windows

    if "text" not in inputs:
        return prose_ids(lambda text: tokenizer(text, verbose=False)["input_ids"], count, tokens)
    found: NDArray[np.int64] = windows(inputs["text"], "calibrate", tokenizer, tokens, most=count).numpy()
    return found


def _carry(source: Path, output: Path) -> None:
    """Files that serving reads; `tokenizer.json`, the only one by which engines read texts, is what transformers reads.

    Its class of tokenizers makes some parts by itself, or by tokenizer_config.json, and takes others from that file; a
    checkpoint may bring the same in an older format.
    """
    from stages.models.checkpoint.layout import TOKENIZER, carry_served
    from stages.models.checkpoint.loading import load_tokenizer
    from stages.serving.artifact_files import bare, read_tokenizer

    carry_served(source, output)
    tokenizer, path = load_tokenizer(source), output / TOKENIZER
    if tokenizer.is_fast:
        read = bare(tokenizer.backend_tokenizer)
        if not path.is_file() or read_tokenizer(path).to_str() != read.to_str():
            read.save(str(path))
    elif not path.is_file():
        raise StageError("the tokenizer cannot be written as tokenizer.json", measured=type(tokenizer).__name__)


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
    admit=admit,
)
