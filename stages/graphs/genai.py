"""A graph with a cache as onnxruntime-genai calls it, and the file by which it knows the model.

It hands over a mask in place of lengths, asks for the logits of what comes next, and keeps one buffer a layer, as long
as its longest sequence, that is past and present at once: what a cache of places is.

Shapes: N sequences, T new tokens, S tokens of the mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from stages.graphs import onnx_graph
from stages.graphs.ort_nodes import constant, placed
from stages.models.checkpoint.json_files import read_json
from stages.runtime.contract import StageError

FILE, CONFIG = "model.onnx", "genai_config.json"
_IDS, _MASK, _LENGTHS, _ASKED = "input_ids", "attention_mask", "past_lengths", "logits_at"
_KIND = "decoder"
"""onnxruntime-genai's word for a decoder of no family of its own."""


def write_folder(source: Path, described: Mapping[str, Any], output: Path) -> None:
    """Write the graph of a folder and the file that describes it.

    Args:
        source: of a graph, or of an engine that ONNX Runtime executes.
        described: its `graph.json` or `engine.json`.
        output: where to.

    Raises:
        StageError: see `genai_config`.
    """
    config = read_json(source / "config.json")
    told = genai_config(described, config, read_json(source / "generation_config.json", optional=True))
    model = onnx_graph.load(source / FILE)
    take_mask(model)
    onnx_graph.save(model, output / FILE)
    (output / CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def take_mask(model: ir.Model) -> None:
    """Rewrite in place: inputs `input_ids`, `attention_mask` and the cache; logits of each row's last token, [N, 1, V].

    A prompt's rows are padded on their right. A later step's new tokens stand at the end of the mask.
    """
    graph = model.graph
    inputs = {str(one.name): one for one in graph.inputs}
    ids, first = inputs[_IDS], next(iter(graph))
    rows = None if ids.shape is None else ids.shape[0]
    mask = ir.Value(name=_MASK, shape=ir.Shape([rows, "seen"]), type=ids.type)
    axis, nothing = constant(graph, "along_tokens", np.array([1])), constant(graph, "nothing_yet", np.array([0]))
    one = constant(graph, "one_token", np.array([1]))
    known_N = placed(graph, first, "ReduceSum", [mask, axis], keepdims=0).outputs[0]
    tokens = placed(graph, first, "Shape", [ids], start=1, end=2).outputs[0]
    # Fewer are known than were handed over where a prompt's row is padded: it has no past either.
    before_N = placed(graph, first, "Sub", [known_N, tokens]).outputs[0]
    past_N = placed(graph, first, "Max", [before_N, nothing]).outputs[0]
    new_N = placed(graph, first, "Sub", [known_N, past_N]).outputs[0]
    last_N = placed(graph, first, "Sub", [new_N, one]).outputs[0]
    last_N1 = placed(graph, first, "Unsqueeze", [last_N, axis]).outputs[0]
    ir.convenience.replace_all_uses_with(inputs[_LENGTHS], past_N)
    ir.convenience.replace_all_uses_with(inputs[_ASKED], last_N1)
    kept = [one for name, one in inputs.items() if name not in (_IDS, _LENGTHS, _ASKED)]
    graph.inputs[:] = [ids, mask, *kept]
    logits = graph.outputs[0]
    if logits.shape is not None:
        logits.shape = ir.Shape([rows, 1, logits.shape[2]])


def genai_config(
    described: Mapping[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """What `genai_config.json` says.

    Args:
        described: `graph.json` or `engine.json`.
        config: `config.json`.
        generation: `generation_config.json`.

    Raises:
        StageError: onnxruntime-genai cannot keep what the graph keeps, or the model writes no text, or none
            that ends.
    """
    _refuse_others(described)
    layer = _like_each_other(described)
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    first = (ends if isinstance(ends, list) else [ends])[0]
    begins, pads = (generation.get(name, config.get(name)) for name in ("bos_token_id", "pad_token_id"))
    if first is None:
        raise StageError(
            "onnxruntime-genai takes no model without an end",
            measured="no eos_token_id in generation_config.json and config.json",
            remedy="Write it into the checkpoint's generation_config.json and run the recipe again.",
        )
    longest, state = int(described["maximum_tokens"]), ("key", "value")
    heads = config.get("num_attention_heads", config.get("n_head", layer["heads"]))
    width = config.get("hidden_size", config.get("n_embd", heads * layer["key_size"]))
    search = {"max_length": longest, "past_present_share_buffer": True, "num_beams": 1, "do_sample": False}
    return {
        "model": {
            "type": _KIND,
            "vocab_size": described["vocabulary"],
            "context_length": longest,
            "bos_token_id": first if begins is None else begins,
            "eos_token_id": ends,
            "pad_token_id": first if pads is None else pads,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": FILE,
                "head_size": layer["key_size"],
                "hidden_size": width,
                "num_attention_heads": heads,
                "num_hidden_layers": len(described["cache"]["layers"]),
                "num_key_value_heads": layer["heads"],
                "inputs": {_IDS: _IDS, _MASK: _MASK}
                | {f"past_{one}_names": f"past_key_values.%d.{one}" for one in state},
                "outputs": {"logits": "logits"} | {f"present_{one}_names": f"present.%d.{one}" for one in state},
            },
        },
        "search": search,
    }


def _refuse_others(described: Mapping[str, Any]) -> None:
    """Raise StageError for what onnxruntime-genai does not write by."""
    if (task := described.get("task", "generate")) != "generate":
        raise StageError(
            "onnxruntime-genai is handed only models that continue texts",
            measured=f"its task is {task}",
            limit="generate",
            remedy="Take --format onnx, whose graphs any program can call.",
        )
    if (dtype := described.get("dtype", "float32")) != "float32":
        raise StageError(
            "onnxruntime-genai is handed only graphs in float32 here",
            measured=dtype,
            limit="float32",
            remedy="Export another graph without `dtype`.",
        )


def _like_each_other(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """What each layer keeps, where all keep the same."""
    layers = (described.get("cache") or {}).get("layers") or []
    sizes = sorted({(one["heads"], one["key_size"], one["value_size"]) for one in layers})
    if len(sizes) != 1 or sizes[0][1] != sizes[0][2]:
        raise StageError(
            "onnxruntime-genai keeps as much for each layer, keys and values alike",
            measured="a graph without a cache" if not sizes else f"(heads, size of keys, of values): {sizes}",
            limit="one size",
            remedy="Take --format onnx, whose graph any program can call.",
        )
    found: Mapping[str, Any] = layers[0]
    return found
