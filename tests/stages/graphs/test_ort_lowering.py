"""Products of float activations and INT8 weights, computed on integers."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stages.adapters.onnxruntime import has_exact_kernels, open_session
from stages.graphs import ort_engine, ort_lowering

INPUTS, OUTPUTS, ROWS = 64, 24, 96
RNG = np.random.default_rng(3)


def model(table: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> ir.Model:
    """logits = (table[input_ids] @ dequantized(weight)); the mask is read for nothing."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
        helper.make_node("Identity", ["attention_mask"], ["unused"]),
    ]
    held = [
        numpy_helper.from_array(array, name) for name, array in (("table", table), ("weight", weight), ("scale", scale))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")],
        [value("logits", TensorProto.FLOAT, ["n", "t", OUTPUTS])],
        held,
        value_info=[value("x", TensorProto.FLOAT, ["n", "t", INPUTS])],
    )
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )


@pytest.mark.parametrize("massive", [1.0, 3000.0])
def test_product_of_float_activations_is_exact_beside_massive_ones(tmp_path, massive):
    table = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    table[:, 5] *= massive
    table[7] = 0  # a row without any largest value
    weight = RNG.integers(-127, 128, (INPUTS, OUTPUTS), dtype=np.int8)
    scale = RNG.uniform(0.001, 0.02, OUTPUTS).astype(np.float32)
    weight[5] = 0  # what is massive must not hide what the others lose
    made = model(table, weight, scale)
    assert ort_lowering.lower(made) == {"split_products": 1}
    kinds = Counter(node.op_type for node in made.graph)
    assert kinds["MatMul"] == 0 and kinds["MatMulIntegerToFloat"] == 1
    ir.save(made, tmp_path / "model.onnx")
    ids = np.arange(ROWS).reshape(2, ROWS // 2)
    found = open_session(tmp_path / "model.onnx").logits(ids).reshape(ROWS, OUTPUTS)
    exact = table.astype(np.float64) @ (weight.astype(np.float64) * scale)
    # Beside it fp32 itself: each term is rounded to 2^-24 of the largest.
    limit = 2.0**-22 * np.abs(table).max(1, keepdims=True) * (np.abs(weight.astype(np.float64)) * scale).sum(0)
    assert (np.abs(found - exact) <= limit + 1e-30).all()
    assert not found[7].any()


@pytest.mark.parametrize("digits, steps", [(1, 127), (2, 127 * 254)])
def test_rounded_product_is_that_of_integers_with_a_scale_for_each_row(tmp_path, digits, steps):
    table = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    table[3], table[7] = table[3] * 3000, 0  # massive, and without any largest value
    weight = RNG.integers(-127, 128, (INPUTS, OUTPUTS), dtype=np.int8)
    scale = RNG.uniform(0.001, 0.02, OUTPUTS).astype(np.float32)
    made = model(table, weight, scale)
    ort_lowering.lower(made)
    assert ort_lowering.round_activations(made, {"weight": ort_lowering.DIGITS}.__getitem__) == 0
    assert ort_lowering.round_activations(made, {"weight": digits}.__getitem__) == 1
    kinds = Counter(node.op_type for node in made.graph)
    assert kinds["MatMulIntegerToFloat"] == 1 and kinds["QuantizeLinear"] == digits
    assert kinds["ReduceSum"] == (digits > 1)
    ir.save(made, tmp_path / "model.onnx")
    found = open_session(tmp_path / "model.onnx").logits(np.arange(ROWS).reshape(2, ROWS // 2)).reshape(ROWS, OUTPUTS)
    step = np.abs(table.astype(np.float64)).max(1, keepdims=True) / steps
    codes = np.rint(np.divide(table, step, out=np.zeros(table.shape), where=step > 0))
    expected = codes @ weight.astype(np.float64) * step * scale
    # A value halfway between two codes may go to either.
    assert (np.abs(found - expected) > 1e-5 * np.abs(expected).max(1, keepdims=True)).mean() < 0.01
    assert not found[7].any()


def test_activations_that_several_products_read_are_split_once():
    table = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    made = model(table, RNG.integers(-127, 128, (INPUTS, OUTPUTS), dtype=np.int8), np.full(OUTPUTS, 0.01, np.float32))
    (product,) = [node for node in made.graph if node.op_type == "MatMul"]
    second = ir.Node("", "MatMul", list(product.inputs), num_outputs=1)
    made.graph.append(second)
    made.graph.outputs.append(second.outputs[0])
    assert ort_lowering.lower(made) == {"split_products": 2}
    kinds = Counter(node.op_type for node in made.graph)
    assert kinds["MatMulIntegerToFloat"] == 2 and kinds["QuantizeLinear"] == ort_lowering.DIGITS


@pytest.mark.parametrize("rewritten", [False, True])
def test_relu_before_rounding_to_fp8_stays(tmp_path, rewritten):
    """ONNX Runtime 1.31 leaves it out by itself: our session forbids that, and an engine holds none."""
    table = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale", "zero"], ["logits"]),
        helper.make_node("Identity", ["attention_mask"], ["unused"]),
    ]
    held = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array(0.01, np.float32), "scale"),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    inputs = [value(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")]
    graph = helper.make_graph(nodes, "g", inputs, [value("logits", TensorProto.FLOAT, ["n", "t", INPUTS])], held)
    opset = [helper.make_opsetid("", 23)]
    made = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opset, ir_version=10))
    if rewritten:
        ort_lowering.lower(made)
    path = tmp_path / "model.onnx"
    ir.save(made, path)
    ids = np.arange(ROWS).reshape(2, -1)
    if rewritten:  # as another program opens it
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(["logits"], {"input_ids": ids, "attention_mask": ids})[0]
    else:
        found = open_session(path).logits(ids)
    wanted = (np.maximum(table, 0) / 0.01).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.01
    np.testing.assert_allclose(found.reshape(ROWS, INPUTS), wanted, atol=1e-6)


def tied(table: np.ndarray, scale: np.ndarray) -> ir.Model:
    """logits = x @ x^T of a table in INT8 that is the head as well."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale"], ["w"], axis=0),
        helper.make_node("Gather", ["w", "input_ids"], ["x"]),
        helper.make_node("Transpose", ["w"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("input_ids", TensorProto.INT64, ["n", "t"])],
        [value("logits", TensorProto.FLOAT, ["n", "t", len(table)])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(scale, "scale")],
        value_info=[value("x", TensorProto.FLOAT, ["n", "t", table.shape[1]])],
    )
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["weights", "tied"])
def test_engine_is_right_in_any_programs_session_on_any_processor(tmp_path, monkeypatch, kind, exact):
    if exact and not has_exact_kernels():
        pytest.skip("this processor's fast kernels saturate; the other case covers what is built here")
    monkeypatch.setattr(ort_engine, "has_exact_kernels", lambda: exact)
    largest = np.where(RNG.integers(0, 2, (ROWS, INPUTS)), 127, -127).astype(np.int8)  # pairs of them saturate
    scale = RNG.uniform(0.001, 0.02, ROWS).astype(np.float32)
    if kind == "tied":
        made, w = tied(largest, scale), largest * scale[:, None]
        wanted = w.astype(np.float64) @ w.T
    else:
        table = largest.astype(np.float32)
        made = model(table, np.full((INPUTS, OUTPUTS), 127, np.int8), scale[:OUTPUTS])
        wanted = table.astype(np.float64) @ (127.0 * np.ones((INPUTS, OUTPUTS)) * scale[:OUTPUTS])
    (tmp_path / "graph").mkdir()
    ir.save(made, tmp_path / "graph" / "model.onnx")
    ort_engine.lower(tmp_path / "graph" / "model.onnx", tmp_path / "model.onnx", [])
    products = [node for node in ir.load(tmp_path / "model.onnx").graph if node.op_type == "MatMulIntegerToFloat"]
    assert [len(node.inputs) for node in products] == [5 if exact else 6]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = np.arange(ROWS)[None]
    (found,) = session.run(["logits"], {"input_ids": ids} | ({} if kind == "tied" else {"attention_mask": ids}))
    np.testing.assert_allclose(found[0], wanted, atol=1e-5 * np.abs(wanted).max())
