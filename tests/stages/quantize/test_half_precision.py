"""Checkpoints in 16 bits: every number is the nearest, transformers loads them, what is one tensor stays one."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from stages.export.stage import ExportParams, export
from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.loading import load_model, save_model
from stages.quantize.half_precision import FORMATS
from stages.quantize.params import QuantizeParams
from stages.quantize.stage import quantize
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from tests.conftest import sealer
from tests.engines import literal, one_block, token_windows
from tests.stages.models.families import FAMILIES, answers, family, library

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def bits(tensor):
    return tensor.view(torch.int16).numpy()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_in_sixteen_bits_holds_the_nearest_numbers_and_loads_everywhere(name, form, root, tmp_path):
    folder = family(name, root)
    metrics = quantize(QuantizeParams(scheme=form), {"model": folder}, tmp_path / "out", Silent())
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if tensor.is_floating_point():
            assert np.array_equal(bits(after[key]), tensor.numpy().astype(NUMPY[form]).view(np.int16)), key
        else:
            assert torch.equal(after[key], tensor)
    rows = {row["layer"]: row for row in json.loads((tmp_path / "out" / "layers.json").read_text())["layers"]}
    assert len(rows) == metrics["halved_tensors"] == sum(one.is_floating_point() for one in before.values())
    assert 0 < metrics["largest_error_ratio"] < (2.0**-16 if form == "bf16" else 2.0**-20)
    found = getattr(transformers, FAMILIES[name][0])
    theirs, info = found.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert theirs.dtype == FORMATS[form]
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    ours = load_model(tmp_path / "out")
    assert torch.allclose(answers(ours), answers(library(name, tmp_path / "out")), atol=1e-5)
    dense = answers(load_model(folder))
    assert 0 < (answers(ours) - dense).norm() < 0.05 * dense.norm()


def test_error_of_a_map_is_that_of_its_rounding(root, tmp_path):
    folder = family("gpt2", root)
    quantize(QuantizeParams(scheme="bf16"), {"model": folder}, tmp_path / "out", Silent())
    rows = {row["layer"]: row for row in json.loads((tmp_path / "out" / "layers.json").read_text())["layers"]}
    name = "transformer.h.1.mlp.c_fc"
    w = load_file(folder / "model.safetensors")[f"{name}.weight"].numpy().astype(np.float64)
    near = w.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert rows[name]["error"] == pytest.approx(((w - near) ** 2).sum() / (w**2).sum(), rel=1e-4)
    assert (rows[name]["block"], rows["transformer.wte"]["block"]) == (1, None)


def test_maps_that_are_skipped_stay_float_and_all_else_does_not(shared_store, dense):
    done = sealer(shared_store)("quantize", {"scheme": "bf16", "skip": ("*.down_proj",)}, model=dense)
    folder = shared_store.checkout(done.identity)
    stored = load_file(folder / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert {kind for name, kind in kinds.items() if "down_proj" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "down_proj" not in name} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert done.manifest.metrics["quantized_maps"] == 36
    assert sealer(shared_store)("quantize", {"scheme": "bf16", "skip": ("*.down_proj",)}, model=dense).cached


def test_number_beyond_fp16_is_refused_by_its_name_and_bf16_takes_it(tiny, tmp_path):
    model = load_model(tiny)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 70000.0
    save_model(model, tmp_path / "wide", like=tiny)
    inputs = {"model": tmp_path / "wide"}
    with pytest.raises(StageError, match=r"layers\.2\.mlp\.up_proj.*float16; measured 70000; limit 65504.*bf16"):
        quantize(QuantizeParams(scheme="fp16"), inputs, tmp_path / "never", Silent())
    assert not (tmp_path / "never" / "model.safetensors").exists()
    skipped = QuantizeParams(scheme="fp16", skip=("*.2.mlp.up_proj",))
    assert quantize(skipped, inputs, tmp_path / "some", Silent())["quantized_maps"] == 41
    assert quantize(QuantizeParams(scheme="bf16"), inputs, tmp_path / "all", Silent())["quantized_maps"] == 42


def test_checkpoint_that_is_in_sixteen_bits_already_is_refused(shared_store, dense):
    half = sealer(shared_store)("quantize", {"scheme": "bf16"}, model=dense).identity
    with pytest.raises(StageError, match="no tensor of more than 16 bits; measured BF16"):
        sealer(shared_store)("quantize", {"scheme": "bf16"}, model=half)


def test_shared_bases_and_ties_stay_one_tensor(tiny, tmp_path):
    from tests.stages.models.grouped import grouped

    folder = grouped(tiny, tmp_path / "grouped")
    quantize(QuantizeParams(scheme="bf16"), {"model": folder}, tmp_path / "out", Silent())
    names = [load_file(one / "model.safetensors").keys() for one in (folder, tmp_path / "out")]
    assert names[0] == names[1]
    model = load_model(tmp_path / "out")
    layers = model.model.layers
    assert layers[1].mlp.gate_proj.basis is layers[2].mlp.gate_proj.basis
    assert layers[3].self_attn.v_proj.weight is layers[4].self_attn.v_proj.weight
    assert anatomy.head(model).weight is anatomy.embedding(model).weight


def test_checkpoint_in_sixteen_bits_exports_to_a_graph_of_the_same_numbers(tiny, tmp_path):
    checkpoint = one_block(tiny, tmp_path / "one")
    quantize(QuantizeParams(scheme="fp16"), {"model": checkpoint}, tmp_path / "half", Silent())
    (tmp_path / "graph").mkdir()
    export(ExportParams(), {"model": tmp_path / "half"}, tmp_path / "graph", Silent())
    ids = token_windows(2, 40)
    with torch.no_grad():
        wanted = load_model(tmp_path / "half")(input_ids=torch.from_numpy(ids)).logits.numpy()
    found = literal(tmp_path / "graph" / "model.onnx", ids)
    assert np.abs(found - wanted).max() < 1e-4


def test_layout_of_quantized_layers_is_refused():
    with pytest.raises(ValueError, match="holds no bf16"):
        QuantizeParams(scheme="bf16", layout="compressed-tensors", embedding="keep")
