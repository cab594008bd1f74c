"""Checkpoints and graphs for the tests of export, compile and serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from stages.graphs import onnx_graph, uncached
from stages.models.checkpoint.loading import load_model, save_model
from stages.models.layers import low_rank_linear, quantized_linear
from stages.models.layers.quantized_linear import QuantizedEmbedding, QuantizedLinear
from stages.runtime.artifacts import Store
from tests.conftest import sealer


def literal(path: Path, ids_NT: np.ndarray, mask_NT: np.ndarray | None = None) -> np.ndarray:
    """logits_NTV of a graph, with a cache or without, as ONNX Runtime runs it without any rewriting."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    rows, tokens = ids_NT.shape
    feeds = {"input_ids": ids_NT}
    for one in session.get_inputs():
        if one.name == "attention_mask":
            feeds[one.name] = np.ones_like(ids_NT) if mask_NT is None else mask_NT
        elif one.name == "past_lengths":
            feeds[one.name] = np.zeros(rows, np.int64)
        elif one.name == "logits_at":
            feeds[one.name] = np.tile(np.arange(tokens), (rows, 1))
        elif one.name.startswith("past_key_values"):
            feeds[one.name] = np.zeros((rows, one.shape[1], tokens, one.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


def without_cache(graph: Path, folder: Path) -> Path:
    """The same graph as backends get it that keep nothing."""
    model = onnx_graph.load(graph)
    uncached.without_cache(model)
    onnx_graph.save(model, folder / "whole.onnx")
    return folder / "whole.onnx"


ROUNDED = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Hears:
    """A listener that keeps what it heard."""

    def __init__(self):
        self.fractions, self.notes = [], []

    def advanced(self, done, total):
        self.fractions.append(done / total)

    def metric(self, name, value, step):
        pass

    def note(self, text):
        self.notes.append(text)


def rounded(w_OI: torch.Tensor, top: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding of rows, written independently of the project's."""
    scale_O = w_OI.abs().amax(-1) / top
    return torch.round(w_OI / scale_O[..., None]).to(torch.int8), scale_O


def mixed_checkpoint(tiny: Path, folder: Path) -> Path:
    """Every kind of layer at once.

    Block 0 has INT8 activations and weights, block 1 INT4 weights in blocks of 32, block 2 INT8 weights alone, blocks
    4 and 5 read a common basis (of full rank, so that the function is the same); table and head are one INT8 table.
    """
    model = load_model(tiny)
    _share(model, ["model.layers.4.mlp.gate_proj", "model.layers.5.mlp.gate_proj"])
    peaks = _peaks(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(("model.layers.0.", "model.layers.1.", "model.layers.2.")):
            quantized_linear.replace(model, name, _quantized(module, name, peaks))
    table, head = QuantizedEmbedding(768, 64), QuantizedLinear(64, 768)
    table.weight, table.weight_scale = rounded(model.model.embed_tokens.weight.data)
    head.weight, head.weight_scale = table.weight, table.weight_scale
    quantized_linear.replace(model, "model.embed_tokens", table)
    quantized_linear.replace(model, "lm_head", head)
    save_model(model, folder, like=tiny)
    return folder


def one_block(tiny: Path, folder: Path, **changes: object) -> Path:
    """The first block of the tiny Llama between its table and its head: quick to export."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    config = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": 1} | changes
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {k: v for k, v in load_file(tiny / "model.safetensors").items() if ".layers." not in k or ".layers.0." in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def _share(model, names: list[str]) -> None:
    weights = torch.cat([model.get_submodule(name).weight.data for name in names])
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    low_rank_linear.install(model, {"shared": [{"modules": names, "rank": len(values)}]})
    places = [model.get_submodule(name) for name in names]
    with torch.no_grad():
        places[0].basis.weight.copy_(right)
        for place, part in zip(places, (left * values).chunk(len(names)), strict=True):
            place.coefficient.weight.copy_(part)


def _peaks(model) -> Mapping[str, float]:
    peaks: dict[str, float] = {}

    def hook(name):
        return lambda _module, inputs: peaks.__setitem__(name, inputs[0].abs().max().item())

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(input_ids=torch.arange(0, 600).view(2, 300))
    for handle in handles:
        handle.remove()
    return peaks


def _quantized(linear: nn.Linear, name: str, peaks: Mapping[str, float]) -> QuantizedLinear:
    inputs, outputs = linear.in_features, linear.out_features
    if ".1." in name:
        made = QuantizedLinear(inputs, outputs, form="int4", block=32)
        q_OKB, made.weight_scale = rounded(linear.weight.data.unflatten(1, (-1, 32)), 7)
        made.weight_scale = made.weight_scale.half()
        made.weight = quantized_linear.pack_int4(q_OKB.flatten(1))
        return made
    made = QuantizedLinear(inputs, outputs, input_form="int8" if ".0." in name and name.endswith(ROUNDED) else None)
    made.weight, made.weight_scale = rounded(linear.weight.data)
    if made.input_scale is not None:
        made.input_scale = torch.tensor(peaks[name] / 127)
    return made


@pytest.fixture(scope="session")
def mixed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the mixed checkpoint."""
    return mixed_checkpoint(tiny, tmp_path_factory.mktemp("mixed") / "checkpoint")


@pytest.fixture(scope="session")
def mixed_graph(shared_store: Store, mixed: Path) -> Path:
    """Folder of the mixed checkpoint's sealed graph; exported once a session, whoever asks."""
    seal = sealer(shared_store)
    checkpoint = seal("fetch", {"source": mixed.as_uri()}).identity
    return shared_store.checkout(seal("export", {}, model=checkpoint).identity)


def token_windows(count: int, tokens: int) -> np.ndarray:
    """Some tokens of the tiny vocabulary."""
    return np.random.default_rng(7).integers(1, 768, (count, tokens))
