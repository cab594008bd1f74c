"""Two graphs over one file of weights."""

import numpy as np
import onnx_ir as ir

from stages.adapters.backends import ENCODER
from stages.graphs import components, onnx_graph

TABLE = np.random.default_rng(8).standard_normal((64, 64)).astype(np.float32)


def reading(number: int) -> ir.Model:
    """A graph that multiplies by the table that all share, and by one of its own."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    held = []
    for name, array in (("shared", TABLE), ("own", TABLE + number)):
        tensor = ir.tensor(array, name=name)
        held.append(ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=x.type))
    first = ir.Node("", "MatMul", [x, held[0]], num_outputs=1)
    second = ir.Node("", "MatMul", [first.outputs[0], held[1]], num_outputs=1)
    second.outputs[0].name, second.outputs[0].type, second.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph([x], [second.outputs[0]], nodes=[first, second], initializers=held, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def test_weights_that_two_graphs_share_lie_once_and_are_counted_once(tmp_path):
    components.save([reading(1), reading(2)], tmp_path / "model.onnx")
    assert (tmp_path / ENCODER).is_file()
    held = onnx_graph.held(*components.load(tmp_path / "model.onnx"))
    assert held.size_bytes == 3 * TABLE.nbytes
    assert 3 * TABLE.nbytes <= (tmp_path / "model.onnx.data").stat().st_size < 3.5 * TABLE.nbytes
    read = components.load(tmp_path / "model.onnx")
    for model, number in zip(read, (1, 2), strict=True):
        assert np.array_equal(model.graph.initializers["shared"].const_value.numpy(), TABLE)
        assert np.array_equal(model.graph.initializers["own"].const_value.numpy(), TABLE + number)
