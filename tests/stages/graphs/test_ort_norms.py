"""A sum and its norm in one node."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from stages.adapters.onnxruntime import open_session
from stages.graphs.ort_norms import fuse_norms

HIDDEN, ROWS = 16, 40
RNG = np.random.default_rng(4)
TABLES = {name: RNG.standard_normal((ROWS, HIDDEN)).astype(np.float32) for name in ("left", "right")}
WEIGHT, BIAS = (RNG.standard_normal(HIDDEN).astype(np.float32) for _ in range(2))


def model(kind: str, right: str = "right_rows") -> ir.Model:
    """logits = sum + norm(sum) of rows of two tables: the sum is read besides."""
    value = helper.make_tensor_value_info
    norm = ["weight", "bias"] if kind == "LayerNormalization" else ["weight"]
    nodes = [
        helper.make_node("Gather", ["left", "input_ids"], ["left_rows"]),
        helper.make_node("Gather", ["right", "input_ids"], ["right_rows"]),
        helper.make_node("Add", ["left_rows", right], ["sum"]),
        helper.make_node(kind, ["sum", *norm], ["normed"], axis=-1, epsilon=1e-3),
        helper.make_node("Add", ["sum", "normed"], ["logits"]),
        helper.make_node("Identity", ["attention_mask"], ["unused"]),
    ]
    held = [numpy_helper.from_array(array, name) for name, array in (TABLES | {"weight": WEIGHT, "bias": BIAS}).items()]
    inputs = [value(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")]
    known = [
        value(name, TensorProto.FLOAT, ["n", "t", HIDDEN]) for name in ("left_rows", "right_rows", "sum", "normed")
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["n", "t", HIDDEN])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held, value_info=known)
    opset = [helper.make_opsetid("", 23)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opset, ir_version=10))


@pytest.mark.parametrize("kind", ["RMSNormalization", "LayerNormalization"])
def test_sum_that_is_normed_next_is_one_node_and_is_still_read(tmp_path, kind):
    made = model(kind)
    assert fuse_norms(made) == 1
    kinds = Counter(node.op_type for node in made.graph)
    assert kinds["Add"] == 1 and not kinds[kind]
    ir.save(made, tmp_path / "model.onnx")
    ids = np.arange(ROWS).reshape(2, -1)
    total = (TABLES["left"] + TABLES["right"]).astype(np.float64)
    centred = total - total.mean(1, keepdims=True) if kind == "LayerNormalization" else total
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-3) * WEIGHT
    wanted = total + normed + (BIAS if kind == "LayerNormalization" else 0)
    found = open_session(tmp_path / "model.onnx").logits(ids).reshape(ROWS, HIDDEN)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_sum_with_a_vector_is_left_alone():
    assert fuse_norms(model("RMSNormalization", right="weight")) == 0
