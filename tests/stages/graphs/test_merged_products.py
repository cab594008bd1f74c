"""Products of the same activations in one."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from stages.adapters.onnxruntime import open_session
from stages.graphs import ort_lowering
from stages.graphs.merged_products import mend_shared, merge_products

INPUTS, ROWS, BLOCK = 64, 96, 16
WIDTHS = {"q": 24, "k": 8, "v": 40}
RNG = np.random.default_rng(6)
TABLE = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)


def weights(kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> integers [I, O] and their scales, [O] or [B, O]."""
    made = {}
    for name, width in WIDTHS.items():
        if kind == "int8":
            q = RNG.integers(-127, 128, (INPUTS, width), dtype=np.int8)
            made[name] = (q, RNG.uniform(0.001, 0.02, width).astype(np.float32))
        else:
            q = RNG.integers(-8, 8, (INPUTS, width)).astype(ml_dtypes.int4)
            made[name] = (q, RNG.uniform(0.01, 0.2, (INPUTS // BLOCK, width)).astype(np.float32))
    return made


def model(kind: str, held: dict[str, tuple[np.ndarray, np.ndarray]], reads: str = "x", again: str = "") -> ir.Model:
    """logits = the products of rows of a table with each of the weights.

    `reads` is what the last one reads; the weights named in `again`, by their letters, multiply -x, too.
    """
    value = helper.make_tensor_value_info
    where = {"axis": 1} if kind == "int8" else {"axis": 0, "block_size": BLOCK}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x"]), helper.make_node("Neg", ["x"], ["y"])]
    arrays = [numpy_helper.from_array(TABLE, "table")]
    for name, (q, scale) in held.items():
        arrays += [numpy_helper.from_array(q, name), numpy_helper.from_array(scale, f"{name}.scale")]
        nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [f"{name}.float"], **where))
        nodes.append(
            helper.make_node("MatMul", [reads if name == "v" else "x", f"{name}.float"], [f"{name}.out"], name=name)
        )
    nodes += [helper.make_node("MatMul", ["y", f"{name}.float"], [f"{name}.again"]) for name in again]
    nodes.append(
        helper.make_node(
            "Concat", [*(f"{name}.out" for name in held), *(f"{name}.again" for name in again)], ["logits"], axis=-1
        )
    )
    nodes.append(helper.make_node("Identity", ["attention_mask"], ["unused"]))
    inputs = [value(name, TensorProto.INT64, ["n", "t"]) for name in ("input_ids", "attention_mask")]
    known = [value(name, TensorProto.FLOAT, ["n", "t", INPUTS]) for name in ("x", "y")]
    known += [value(f"{name}.out", TensorProto.FLOAT, ["n", "t", width]) for name, width in WIDTHS.items()]
    known += [value(f"{name}.again", TensorProto.FLOAT, ["n", "t", WIDTHS[name]]) for name in again]
    width = sum(WIDTHS[name] for name in (*held, *again))
    outputs = [value("logits", TensorProto.FLOAT, ["n", "t", width])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, arrays, value_info=known)
    opset = [helper.make_opsetid("", 23)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opset, ir_version=10))


def exact(held: dict[str, tuple[np.ndarray, np.ndarray]], last: float = 1.0) -> np.ndarray:
    """[R, O] in float64, the last product's activations times `last`."""
    found = []
    for name, (q, scale) in held.items():
        scales = scale if scale.ndim == 1 else np.repeat(scale, BLOCK, axis=0)
        found.append((last if name == "v" else 1.0) * (TABLE.astype(np.float64) @ (q.astype(np.float64) * scales)))
    return np.concatenate(found, axis=-1)


@pytest.mark.parametrize(("kind", "product"), [("int8", "MatMulIntegerToFloat"), ("int4", "MatMulNBits")])
def test_products_of_the_same_activations_are_one_with_the_same_numbers(tmp_path, kind, product):
    held = weights(kind)
    made = model(kind, held)
    assert merge_products(made) == 2
    ort_lowering.lower(made)
    kinds = Counter(node.op_type for node in made.graph)
    assert kinds[product] == 1 and kinds["MatMul"] == 0 and kinds["Split"] == 1
    assert not {*held} & {*made.graph.initializers}  # no weight is there twice
    ir.save(made, tmp_path / "model.onnx")
    found = open_session(tmp_path / "model.onnx").logits(np.arange(ROWS).reshape(2, -1)).reshape(ROWS, -1)
    np.testing.assert_allclose(found, exact(held), atol=1e-5 * np.abs(exact(held)).max())


def test_product_of_other_activations_stays_alone(tmp_path):
    held = weights("int8")
    made = model("int8", held, reads="y")
    assert merge_products(made) == 1
    ir.save(made, tmp_path / "model.onnx")
    found = open_session(tmp_path / "model.onnx").logits(np.arange(ROWS).reshape(2, -1)).reshape(ROWS, -1)
    wanted = exact(held, last=-1.0)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_weights_that_two_blocks_share_are_merged_in_both_and_there_once(tmp_path):
    held = weights("int8")
    made = model("int8", held, again="qkv")
    assert merge_products(made) == 4
    assert [name for name in made.graph.initializers if "+" in name] == ["q+k+v", "q.scale+k.scale+v.scale"]
    ir.save(made, tmp_path / "model.onnx")
    found = open_session(tmp_path / "model.onnx").logits(np.arange(ROWS).reshape(2, -1)).reshape(ROWS, -1)
    wanted = np.concatenate([exact(held), -exact(held)], axis=-1)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_weights_of_one_block_alone_may_be_left():
    assert merge_products(model("int8", weights("int8")), shared=True) == 0
    assert merge_products(model("int8", weights("int8"), again="qkv"), shared=True) == 4


def test_shared_weights_are_merged_with_those_alone_that_are_shared_alike(tmp_path):
    held = weights("int8")
    made = model("int8", held, again="qk")
    assert merge_products(made) == 2
    assert "q+k" in made.graph.initializers and "v" in made.graph.initializers
    ir.save(made, tmp_path / "model.onnx")
    found = open_session(tmp_path / "model.onnx").logits(np.arange(ROWS).reshape(2, -1)).reshape(ROWS, -1)
    wanted = np.concatenate([exact(held), -exact(held)[:, : WIDTHS["q"] + WIDTHS["k"]]], axis=-1)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_shared_weights_beside_ones_of_their_own_are_multiplied_apart_with_the_same_numbers(tmp_path):
    held = weights("int8")
    made = model("int8", held, again="q")
    assert mend_shared(made) == 1
    assert Counter(node.op_type for node in made.graph)["Transpose"] == 2
    ir.save(made, tmp_path / "model.onnx")
    found = open_session(tmp_path / "model.onnx").logits(np.arange(ROWS).reshape(2, -1)).reshape(ROWS, -1)
    wanted = np.concatenate([exact(held), -exact(held)[:, : WIDTHS["q"]]], axis=-1)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_weights_that_something_else_reads_too_are_not_doubled():
    made = model("int8", weights("int8"))
    for value in [node.outputs[0] for node in made.graph if node.op_type == "DequantizeLinear"]:
        made.graph.outputs.append(value)
        made.graph.append(ir.Node("", "Identity", [value], num_outputs=1))
    assert merge_products(made) == 0
