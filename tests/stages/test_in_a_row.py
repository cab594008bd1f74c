"""Every technique after the other: what is left is smaller at each step, and each effect stands in the bytes."""

import json

import pytest
import torch

from stages.models.anatomy.blocks import block_parameters
from stages.models.checkpoint.loading import load_model, load_tokenizer
from stages.models.layers.quantization_spec import describe
from stages.models.text.windows import windows
from tests.conftest import sealer

SHORT = {"windows": 6, "window_tokens": 128}


@pytest.fixture(scope="module")
def row(shared_store, dense, topics):
    """Step -> folder of its checkpoint, in order."""
    seal, made, last = sealer(shared_store), {"dense": shared_store.checkout(dense)}, dense
    steps = [
        ("share", {"keep": 0.85} | SHORT),
        ("prune", {"method": "channels", "keep": 0.75} | SHORT),
        ("factorize", {"keep": 0.75} | SHORT),
        ("recover", {"tokens": 8192, "window_tokens": 128, "learning_rate": 1e-3, "check_every_steps": 8}),
        ("quantize", {"scheme": "int4_weight_only", "block": 8} | SHORT),
    ]
    for name, params in steps:
        more = {"teacher": dense} if name == "recover" else {}
        last = seal(name, params, model=last, text=topics, **more).identity
        made[name] = shared_store.checkout(last)
    return made


def test_each_step_in_a_row_leaves_fewer_parameters_or_bytes(row):
    counts = {name: block_parameters(load_model(folder)) for name, folder in row.items()}
    assert counts["dense"] > counts["share"] > counts["prune"] > counts["factorize"]
    assert counts["factorize"] == counts["recover"] == counts["quantize"]
    sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in row.items()}
    assert sizes["quantize"] < 0.25 * sizes["recover"] < 0.25 * sizes["dense"]


def test_each_effect_in_a_row_stands_in_the_last_checkpoint(row):
    folder = row["quantize"]
    model = load_model(folder)
    structure = json.loads((folder / "structure.json").read_text())
    assert any(len(group["modules"]) > 1 for group in structure["shared"])
    assert any(len(group["modules"]) == 1 for group in structure["shared"])
    assert model.config.intermediate_size < load_model(row["dense"]).config.intermediate_size
    assert {entry["format"] for name, entry in describe(model)["layers"].items() if ".layers." in name} == {"int4"}


@torch.no_grad()
def test_the_last_of_the_row_still_speaks(row, shared_store, topics):
    losses = {}
    for name in ("dense", "quantize"):
        ids_NT = windows(shared_store.checkout(topics), "test", load_tokenizer(row["dense"]), 128, most=16)
        losses[name] = float(load_model(row[name])(input_ids=ids_NT, labels=ids_NT).loss)
    assert losses["quantize"] < losses["dense"] + 0.1
