"""What a plan's builder gets computes the same bits, and what a plan holds is read from its bytes."""

import numpy as np
import onnx_ir as ir
import pytest

from stages.graphs import onnx_graph, plan_checks, plan_constants
from tests.engines import Hears, literal, mixed, mixed_graph, token_windows  # noqa: F401


def test_constants_are_laid_out_anew_without_changing_a_bit(mixed_graph, tmp_path):  # noqa: F811
    model = onnx_graph.load(mixed_graph / "model.onnx")
    rounded = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    scales = {node.inputs[1].name for node in rounded}
    assert len(scales) > 3
    plan_constants.share(model)
    onnx_graph.save(model, tmp_path / "shared.onnx")
    ids = token_windows(2, 33)
    assert np.array_equal(literal(tmp_path / "shared.onnx", ids), literal(mixed_graph / "model.onnx", ids))
    nodes = list(model.graph)
    assert {node.inputs[1].name for node in nodes if node.op_type == "QuantizeLinear"} == {"one_step_float32"}
    assert sum(node.op_type == "Div" for node in nodes) >= len(rounded)
    table = model.graph.initializers["model.embed_tokens.weight"]
    (dequantized,) = [user for user, _ in table.uses()]
    (columns,) = [user for user, _ in dequantized.outputs[0].uses()]
    assert columns.op_type == "Transpose"
    assert sorted(user.op_type for user, _ in columns.outputs[0].uses()) == ["Gather", "MatMul"]


def test_scale_of_each_row_and_table_that_nobody_multiplies_stay(tmp_path):
    def value(name, shape, kind=ir.DataType.FLOAT):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))

    def held(name, array):
        return ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))

    table, scale = held("t.weight", np.ones((4, 3), np.int8)), held("t.scale", np.ones(4, np.float32))
    ids, x, rows = value("ids", ["n"], ir.DataType.INT64), value("x", ["n", 4]), held("x.scale", np.ones(4, np.float32))
    wide = ir.Node("", "DequantizeLinear", [table, scale], [ir.AttrInt64("axis", 0)], num_outputs=1)
    looked = ir.Node("", "Gather", [wide.outputs[0], ids], num_outputs=1)
    stepped = ir.Node("", "QuantizeLinear", [x, rows], [ir.AttrInt64("axis", 1)], num_outputs=1)
    graph = ir.Graph([ids, x], [looked.outputs[0], stepped.outputs[0]], nodes=[wide, looked, stepped],
                     initializers=[table, scale, rows], opset_imports={"": 21})  # fmt: skip
    plan_constants.share(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in graph] == ["DequantizeLinear", "Gather", "QuantizeLinear"]


@pytest.fixture
def matrices():
    draw = np.random.default_rng(0)
    made = {name: draw.integers(-127, 127, (96, 72)).astype(np.int8) for name in ("a", "b", "c")}
    return made | {"f": draw.standard_normal((64, 80)).astype(np.float32), "s": draw.random(5000).astype(np.float32)}


def measured(matrices, plan, folder, heard):
    values = [
        ir.Value(name=name, const_value=ir.tensor(one, name=name), shape=ir.Shape(one.shape))
        for name, one in matrices.items()
    ]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}), ir_version=10)
    (folder / "model.plan").write_bytes(plan)
    return plan_checks.measure([model], [folder / "model.plan"], heard)


def test_weights_side_by_side_and_transposed_are_found_once(matrices, tmp_path):
    heard, kept = Hears(), b"kernels!" * 100
    beside = np.concatenate([matrices["a"], matrices["b"]], axis=1).tobytes()
    plan = kept + beside + matrices["c"].T.tobytes() + matrices["f"].tobytes()
    found = measured(matrices, plan, tmp_path, heard)
    held = sum(one.nbytes for one in matrices.values())
    assert found == {
        "weights_bytes": held, "besides_weights_bytes": len(plan) - held, "weights_found": 1.0,
        "stored_again_bytes": 0.0,
    }  # fmt: skip
    assert not heard.notes


def test_weight_that_is_there_twice_in_either_order_is_named_and_one_that_is_not_is_missed(matrices, tmp_path):
    heard = Hears()
    plan = matrices["a"].tobytes() + matrices["a"].T.tobytes() + matrices["f"].tobytes() + matrices["b"].tobytes()
    found = measured(matrices, plan, tmp_path, heard)
    assert found["stored_again_bytes"] == matrices["a"].nbytes
    assert found["weights_found"] == 3 / 4
    assert heard.notes == ["the plan holds 1 weights more than once: a"]


def test_equal_weights_are_no_copies_of_each_other(matrices, tmp_path):
    matrices["b"] = matrices["a"]
    plan = matrices["a"].tobytes() * 2 + matrices["c"].tobytes() + matrices["f"].tobytes()
    heard = Hears()
    assert measured(matrices, plan, tmp_path, heard)["stored_again_bytes"] == 0 and not heard.notes


def test_what_a_plan_takes_besides_is_noted_beyond_what_is_usual(matrices, tmp_path):
    heard = Hears()
    measured(matrices, bytes(25_000_000), tmp_path, heard)
    (note,) = heard.notes
    assert "beyond its weights, where 24 are usual" in note
