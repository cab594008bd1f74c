"""Inspection reads bytes: against tensors written by the libraries whose formats they are."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from flows.reporting.inspect_artifact import Stored, find_artifact, inspect, read_onnx, read_safetensors, stored
from stages.runtime.contract import StageError
from tests.flows.test_cli import sealed


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64]
)
def test_safetensors_zeros_are_counted_as_torch_counts_them(tmp_path, dtype):
    generator = torch.Generator().manual_seed(3)
    w_OI = torch.randint(-2, 3, (7, 33), generator=generator).to(dtype)
    if dtype.is_floating_point:
        w_OI[0, :5] = -0.0
    save_file({"w": w_OI, "none": torch.empty(0, 3)}, tmp_path / "m.safetensors")
    found = {t.name: t for t in read_safetensors(tmp_path / "m.safetensors")}
    assert found["w"].zeros() == int((w_OI == 0).sum())
    assert (found["w"].dtype, found["w"].shape) == (str(dtype).removeprefix("torch."), (7, 33))
    assert len(found["w"].data) == w_OI.nbytes and found["none"].zeros() == 0


def test_packed_weights_of_four_bits_count_each_half(tmp_path):
    packed = torch.tensor([[0x00, 0x10, 0x01, 0x11]], dtype=torch.uint8)
    save_file({"a.weight": packed, "b.weight": packed.clone()}, tmp_path / "model.safetensors")
    (tmp_path / "quantization.json").write_text(json.dumps({"layers": {"a": {"bits": 4}, "b": {"bits": 8}}}))
    found = {t.name: t for t in stored(tmp_path)}
    assert (found["a.weight"].dtype, found["a.weight"].elements, found["a.weight"].zeros()) == ("int4", 8, 4)
    assert (found["b.weight"].dtype, found["b.weight"].elements, found["b.weight"].zeros()) == ("uint8", 4, 1)


def test_odd_count_of_four_bit_values_leaves_its_spare_half_out():
    assert Stored("x", "int4", (3,), np.array([0x01, 0xF0], np.uint8)).zeros() == 2


def test_onnx_initializers_are_read_inside_and_beside_the_file(tmp_path):
    w_IO = np.array([[0.0, 1.0, -0.0], [2.0, 0.0, 3.0]], np.float32)
    four = helper.make_tensor("q", TensorProto.INT4, (4,), [1, 0, -3, 0])
    scale = helper.make_tensor("s", TensorProto.FLOAT, (1,), [0.5])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="first"),
        helper.make_node("MatMul", ["x", "w"], ["z"], name="second"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y", "z")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(w_IO, "w"), four, scale])
    model = helper.make_model(graph)
    inside, beside = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    for path in (inside, beside):
        path.parent.mkdir()
    onnx.save(model, inside)
    onnx.save(model, beside, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    for path in (inside, beside):
        found = {t.name: t for t in read_onnx(path)}
        assert (found["w"].dtype, found["w"].shape, found["w"].zeros()) == ("float32", (2, 3), 3)
        assert found["w"].places == ("first", "second")
        assert (found["q"].dtype, found["q"].elements, found["q"].zeros()) == ("int4", 4, 2)
        assert (found["s"].zeros(), found["s"].places) == (0, ())


def test_onnx_external_data_outside_the_artifact_is_refused(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), tmp_path / "m.onnx")
    with pytest.raises(StageError, match="points out of its artifact"):
        list(read_onnx(tmp_path / "m.onnx"))


@pytest.mark.parametrize("data", [b"", b"\x00" * 4, b"\xff" * 16])
def test_safetensors_cut_short_are_refused(tmp_path, data):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(StageError, match="no safetensors file"):
        list(read_safetensors(tmp_path / "m.safetensors"))


def test_inspect_tells_sharing_from_waste(store, tmp_path):
    w = torch.arange(2048, dtype=torch.float32).reshape(32, 64)
    path = tmp_path / "m"
    save_file({"a": w, "b": w.clone(), "n1": torch.ones(64), "n2": torch.ones(64)}, path)
    structure = {"shared": [{"modules": ["x.q", "y.q"], "rank": 4}], "tied": [["n.a", "n.b"]]}
    quantization = {"layers": {"lm": {"bits": 8, "tied_to": "embed"}, "big": {"note": "z" * 200_000}}}
    sealed(
        store,
        "healed",
        {
            "model.safetensors": path.read_bytes(),
            "structure.json": json.dumps(structure).encode(),
            "quantization.json": json.dumps(quantization).encode(),
            "config.json": b'{"tie_word_embeddings": true}',
        },
    )
    seen = inspect(store, find_artifact(store, "healed"))
    assert seen.shared == [["x.q", "y.q"], ["n.a", "n.b"], ["embed", "lm"], ["embedding", "head"]]
    assert seen.duplicates == [["a", "b"]] and seen.duplicate_bytes == 8192
    assert seen.sparsity == pytest.approx(2 / 4096) and seen.parameters == 2 * 2048 + 128
    assert [(p.dtype, p.count, p.bytes) for p in seen.precisions] == [("float32", 4, 2 * 8192 + 512)]
    assert set(seen.facts) == {"structure.json", "config.json"}


def test_inspect_of_an_artifact_without_tensors(store):
    sealed(store, "text", {"corpus.json": b'{"digest": "d"}'})
    seen = inspect(store, find_artifact(store, "text"))
    assert (seen.parameters, seen.sparsity, seen.precisions) == (0, 0.0, [])
    assert seen.facts == {"corpus.json": {"digest": "d"}}


def test_find_artifact_takes_the_newest_of_a_step_or_a_fingerprint(store):
    identity = sealed(store, "dense", {"x": b"1"})
    assert find_artifact(store, "dense") == find_artifact(store, identity[:10]) == identity
    with pytest.raises(StageError, match="no artifact"):
        find_artifact(store, "sparse")


def test_float8_zero_of_either_sign_counts():
    data = np.array([0.0, -0.0, 1.0], ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert Stored("x", "float8_e4m3", (3,), data).zeros() == 2
