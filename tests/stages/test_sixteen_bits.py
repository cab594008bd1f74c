"""A checkpoint in 16 bits goes through every verb that makes it smaller and stays in 16 bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.models.checkpoint.loading import load_model
from tests.conftest import sealer

SHORT = {"windows": 4, "window_tokens": 64}
WIDE = "model.layers.1.input_layernorm.weight"
"""Stays in float32 inside the file of 16 bits."""
VERBS = {
    "channels": ("prune", {"method": "channels", "keep": 0.8} | SHORT),
    "blocks": ("prune", {"method": "blocks", "keep": 0.85} | SHORT),
    "width": ("prune", {"method": "width", "keep": 0.8} | SHORT),
    "zeros": ("prune", {"method": "sparsegpt", "pattern": "2:4"} | SHORT),
    "basis": ("share", {"keep": 0.9} | SHORT),
    "recursive": ("share", {"method": "recursive", "keep": 0.8} | SHORT),
    "factorize": ("factorize", {"keep": 0.8, "sparse": 0.2} | SHORT),
    "recover": ("recover", {"tokens": 1024, "window_tokens": 64, "learning_rate": 1e-2, "check_every_steps": 2}),
    "fuse": ("fuse", {"method": "soup", "weights": [1.0, 2.0]}),
    "int8": ("quantize", {"scheme": "int8_weight_only", "embedding": "keep"}),
}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def short(request, tiny, shared_store, tmp_path_factory):
    """The tiny model in 16 bits, sealed."""
    folder, dtype = tmp_path_factory.mktemp("short") / "model", getattr(torch, request.param)
    shutil.copytree(tiny, folder)
    tensors = {key: one if key == WIDE else one.to(dtype) for key, one in load_file(tiny / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": request.param}))
    return sealer(shared_store)("fetch", {"source": str(folder)}).identity, dtype


@pytest.mark.parametrize("verb", VERBS)
def test_verb_leaves_sixteen_bits_in_sixteen_bits(verb, short, dense, topics, shared_store):
    model, dtype = short
    stage, params = VERBS[verb]
    inputs = {"model": model, "text": topics}
    if stage == "recover":
        inputs["teacher"] = dense
    if stage == "fuse":
        inputs = {"models.0": model, "models.1": dense}
    folder = shared_store.checkout(sealer(shared_store)(stage, params, **inputs).identity)
    before = load_file(shared_store.checkout(model) / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    floats = {name: one.dtype for name, one in after.items() if one.is_floating_point() and "_scale" not in name}
    assert {name: before[name].dtype for name in floats if name in before}.items() <= floats.items()
    assert {kind for name, kind in floats.items() if name not in before} <= {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert all(one.isfinite().all() for name, one in after.items() if name in floats)
    if stage != "fuse":
        assert sum(one.nbytes for one in after.values()) <= sum(one.nbytes for one in before.values())
    if not ({"structure.json", "quantization.json"} & {one.name for one in folder.iterdir()}):
        ids_NT = torch.arange(20)[None] * 7
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids_NT).logits
            assert torch.allclose(load_model(folder)(input_ids=ids_NT).logits, theirs, atol=1e-4)
