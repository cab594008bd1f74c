"""ONNX Runtime: settings that keep the graph's numbers, and the vendor's words in its errors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stages.adapters import onnxruntime as adapter
from stages.runtime.contract import DoesNotFit, StageError


def weight_only(path, outlier=1000.0):
    """x @ dequantized(w) over an embedding of 32 rows, one of whose channels is an outlier."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((32, 64)).astype(np.float32)
    table[:, 5] *= outlier
    weight, scale = rng.integers(-127, 128, (64, 48)).astype(np.int8), np.full(48, 0.01, np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m1"]),
        helper.make_node("Mul", ["y", "m1"], ["logits"]),
    ]
    named = {"table": table, "w": weight, "s": scale, "last": np.array([-1])}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(n, TensorProto.INT64, ["n", "t"]) for n in ("input_ids", "attention_mask")],
        [value("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in named.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.save(model, path)
    return table.astype(np.float64) @ (weight * scale.astype(np.float64))


@pytest.mark.parametrize("literal", [True, False])
def test_weight_only_products_are_computed_in_float(tmp_path, literal):
    rows = weight_only(tmp_path / "model.onnx")
    ids = np.arange(32).reshape(2, 16)
    found = adapter.open_session(tmp_path / "model.onnx", literal=literal).logits(ids)
    assert np.abs(found - rows[ids]).max() < 1e-6 * np.abs(rows).max()


def test_mask_reaches_the_graph(tmp_path):
    weight_only(tmp_path / "model.onnx")
    ids = np.arange(4).reshape(1, 4)
    found = adapter.open_session(tmp_path / "model.onnx").logits(ids, np.array([[0, 1, 1, 0]]))
    assert not found[0, [0, 3]].any() and found[0, [1, 2]].any()


def test_damaged_graph_is_refused_with_the_vendors_words(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"junk")
    with pytest.raises(StageError, match=r"could not load the graph; measured .*model.onnx"):
        adapter.open_session(tmp_path / "model.onnx")


def test_refused_input_is_told_with_the_vendors_words(tmp_path):
    weight_only(tmp_path / "model.onnx")
    with pytest.raises(StageError, match=r"could not run the graph; measured .*indices"):
        adapter.open_session(tmp_path / "model.onnx").logits(np.array([[99]]))


def test_memory_that_ran_out_does_not_fit():
    told = adapter._told(RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for 9 bytes"), "run")
    assert isinstance(told, DoesNotFit) and "fewer" in told.remedy


def test_threads_are_those_asked_for_or_all(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert adapter.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert adapter.threads() >= 1


def test_kernels_are_exact_only_where_the_processor_says_so(tmp_path, monkeypatch):
    processor = tmp_path / "cpuinfo"
    processor.write_text("flags: fpu avx2")
    monkeypatch.setattr(adapter.platform, "machine", lambda: "x86_64")
    assert not adapter.has_exact_kernels(processor)
    assert not adapter.has_exact_kernels(tmp_path / "absent")
    processor.write_text("flags: fpu avx512_vnni")
    assert adapter.has_exact_kernels(processor)
    monkeypatch.setattr(adapter.platform, "machine", lambda: "aarch64")
    assert adapter.has_exact_kernels(tmp_path / "absent")


@pytest.mark.parametrize("exact", [True, False])
def test_integer_products_at_the_largest_values_do_not_saturate(tmp_path, monkeypatch, exact):
    """255 * 127 + 255 * 127 is beyond 16 bits: kernels that add pairs in 16 bits cut it off."""
    if exact and not adapter.has_exact_kernels():
        pytest.skip("this processor's fast kernels saturate; the other case covers what is used here")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMulIntegerToFloat", ["x", "w", "one", "ones"], ["logits"], domain="com.microsoft"),
        helper.make_node("Identity", ["attention_mask"], ["unused"]),
    ]
    named = {"table": np.full((4, 64), 255, np.uint8), "w": np.full((64, 16), 127, np.int8),
             "one": np.float32(1), "ones": np.ones(16, np.float32)}  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(n, TensorProto.INT64, ["n", "t"]) for n in ("input_ids", "attention_mask")],
        [value("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in named.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.setattr(adapter, "has_exact_kernels", lambda: exact)
    found = adapter.open_session(tmp_path / "model.onnx").logits(np.zeros((2, 3), np.int64))
    assert (found == 64 * 255 * 127).all()
