"""Graphs as builders of plans get them compute what they did; a refused cache leaves a plan that reads whole texts."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stages.adapters.backends import Asked, Backend
from stages.graphs import onnx_graph, plans, static_cache
from stages.runtime.contract import DoesNotFit, StageError
from tests.engines import Hears, mixed, mixed_graph  # noqa: F401

PLACES = 12


def capped(folder: Path) -> Path:
    """One attention over a cache, of two queries to each key, whose scores are capped."""
    nodes = [
        helper.make_node("TensorScatter", ["past_key_values.0.key", "k", "past_lengths"], ["present.0.key"], axis=2),
        helper.make_node(
            "TensorScatter", ["past_key_values.0.value", "v", "past_lengths"], ["present.0.value"], axis=2
        ),
        helper.make_node(
            "Attention", ["q", "present.0.key", "present.0.value", "seen"], ["logits"], scale=0.4, softcap=1.5
        ),
    ]
    sizes = {"q": ["n", 4, "t", 8], "k": ["n", 2, "t", 8], "v": ["n", 2, "t", 8]}
    sizes |= {f"past_key_values.0.{one}": ["n", 2, "m", 8] for one in ("key", "value")}
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    made += [
        helper.make_tensor_value_info("past_lengths", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("seen", TensorProto.BOOL, ["n", 1, "t", "m"]),
    ]
    answers = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4, "t", 8])]
    answers += [
        helper.make_tensor_value_info(f"present.0.{one}", TensorProto.FLOAT, ["n", 2, "m", 8])
        for one in ("key", "value")
    ]
    inner = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2, "m", 8])
        for name in ("present.0.key", "present.0.value")
    ]
    graph = helper.make_graph(nodes, "g", made, answers, value_info=inner)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), folder / "model.onnx"
    )
    return folder / "model.onnx"


def test_capped_attention_over_a_cache_of_fixed_places_is_spelt_out_and_computes_the_same(tmp_path):
    path = capped(tmp_path)
    model = onnx_graph.load(path)
    static_cache.with_places(model, PLACES)
    onnx_graph.save(model, tmp_path / "static.onnx")
    assert "Attention" not in {node.op_type for node in model.graph}
    session = onnxruntime.InferenceSession(tmp_path / "static.onnx")
    shapes = {one.name: one.shape for one in (*session.get_inputs(), *session.get_outputs())}
    assert all(size[2] == PLACES for name, size in shapes.items() if name.startswith(("past_key", "present")))
    draw = np.random.default_rng(0).standard_normal
    feeds = {name: draw((3, heads, 5, 8)).astype(np.float32) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    feeds |= {f"past_key_values.0.{one}": draw((3, 2, PLACES, 8)).astype(np.float32) for one in ("key", "value")}
    lengths = np.array([0, 3, 7])
    seen = np.arange(PLACES) <= (lengths[:, None] + np.arange(5))[:, None, :, None]
    feeds |= {"past_lengths": lengths, "seen": seen}
    wanted = onnxruntime.InferenceSession(path).run(None, feeds)
    for one, other in zip(wanted, session.run(None, feeds), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_nodes_are_named_after_the_modules_whose_weights_they_read(mixed_graph):  # noqa: F811
    model = onnx_graph.load(mixed_graph / "model.onnx")
    static_cache.name_by_modules(model)
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == len(names)
    kinds = {}
    for node in model.graph:
        kinds.setdefault(node.op_type, []).append(str(node.name).rpartition("/")[0])
    assert {"model.layers.2.mlp.up_proj", "model.layers.5.mlp.gate_proj.coefficient"} <= {
        *kinds["DequantizeLinear"]
    } | {*kinds["MatMul"]}
    attended = [int(re.match(r"model\.layers\.(\d+)\.self_attn", name)[1]) for name in kinds["Attention"]]
    assert attended == [*range(6)]


def asked(graph: Path) -> Asked:
    return Asked(graph=graph, architectures=("sm_89",), maximum_tokens=16, maximum_batch=2, lower=lambda *_: {})


def backend(refuses=None, seen=None, keeps=True) -> Backend:
    """One that copies the graph it gets, unless it takes keys and values and those are refused."""

    def build(one: Asked, output: Path, _progress) -> dict[str, float]:
        names = [value.name for value in onnx_graph.load(one.graph).graph.inputs]
        if seen is not None:
            seen.append((one, names))
        if refuses and any(name.startswith("past_key_values") for name in names):
            raise refuses
        (output / "copied.onnx").write_bytes(one.graph.read_bytes())
        return {"built": 1.0}

    return Backend(library="numpy", executable="copied.onnx", build=build, execute=lambda *_: None, keeps=keeps)


def test_refused_cache_is_noted_with_its_reason_and_whole_texts_are_read(mixed_graph, tmp_path):  # noqa: F811
    heard, seen = Hears(), []
    refusal = StageError("no such operator", measured="model.layers.0.self_attn/TensorScatter_3")
    metrics, kept = plans.build(backend(refusal, seen), asked(mixed_graph / "model.onnx"), tmp_path, heard)
    assert metrics["built"] == 1 and not kept
    assert seen[-1][1] == ["input_ids", "attention_mask"]
    (note,) = heard.notes
    assert "reads the whole text again" in note and "model.layers.0.self_attn/TensorScatter_3" in note
    assert [path.name for path in tmp_path.iterdir()] == ["copied.onnx"]


def test_builder_without_room_or_time_is_not_asked_twice(mixed_graph, tmp_path):  # noqa: F811
    seen = []
    with pytest.raises(DoesNotFit, match="no time"):
        plans.build(backend(DoesNotFit("no time"), seen), asked(mixed_graph / "model.onnx"), tmp_path, Hears())
    assert len(seen) == 1


def test_cache_has_the_plans_places_and_backends_that_keep_nothing_get_none(mixed_graph, tmp_path):  # noqa: F811
    _, kept = plans.build(backend(), asked(mixed_graph / "model.onnx"), tmp_path, Hears())
    inputs = onnxruntime.InferenceSession(tmp_path / "copied.onnx").get_inputs()
    assert kept and {one.shape[2] for one in inputs if one.name.startswith("past_key")} == {16}
    seen = []
    _, kept = plans.build(backend(seen=seen, keeps=False), asked(mixed_graph / "model.onnx"), tmp_path, Hears())
    assert not kept and seen[0][1] == ["input_ids", "attention_mask"]


def product(folder: Path, w_IO: np.ndarray, scale: bool) -> Path:
    held = [numpy_helper.from_array(w_IO, "a.weight")]
    nodes = [helper.make_node("MatMul", ["x", "w" if scale else "a.weight"], ["y"])]
    if scale:
        held.append(numpy_helper.from_array(np.ones(w_IO.shape[1], np.float32), "a.weight_scale"))
        nodes.insert(0, helper.make_node("DequantizeLinear", ["a.weight", "a.weight_scale"], ["w"], axis=1))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", w_IO.shape[0]])], [value("y", TensorProto.FLOAT, None)], held
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return folder / "model.onnx"


@pytest.mark.parametrize("kind", [np.float32, np.int8])
def test_two_zeros_in_four_are_seen_down_the_inputs_alone(tmp_path, kind):
    w_IO = np.arange(1, 97).reshape(16, 6).astype(kind)
    w_IO[1::2] = 0
    assert plans.has_two_in_four(ir.load(product(tmp_path, w_IO, kind == np.int8)))
    w_IO[1, 3] = 1
    assert not plans.has_two_in_four(ir.load(product(tmp_path, w_IO, kind == np.int8)))
    across = np.arange(1, 97).reshape(16, 6).astype(kind)
    across[:, 1::2] = 0
    assert not plans.has_two_in_four(ir.load(product(tmp_path, across, kind == np.int8)))
