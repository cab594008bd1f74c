"""Graphs in 16-bit floats: what stands in them, how near they stay, what builds and what refuses them."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch

from stages import stage
from stages.compile.stage import CompileParams, compile_engine
from stages.export.halving import LIMITS, halve
from stages.export.stage import ExportParams, export
from stages.graphs import half_floats, onnx_graph
from stages.graphs.parity import divergence
from stages.models.checkpoint.loading import load_model
from stages.runtime.contract import StageError
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from tests.engines import Hears, one_block, token_windows

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    """A tiny Llama of one block."""
    return one_block(tiny, tmp_path_factory.mktemp("dense") / "checkpoint")


@pytest.fixture(scope="module")
def halved(dense, tmp_path_factory):
    """dtype -> (folder of the graph, metrics)."""
    found = {}
    for dtype in HALVES:
        folder = tmp_path_factory.mktemp(dtype)
        found[dtype] = folder, export(ExportParams(dtype=dtype), {"model": dense}, folder, Silent())
    return found


@pytest.mark.parametrize("dtype", HALVES)
def test_graph_holds_each_weight_once_in_16_bits_and_keeps_16_bits(halved, dense, dtype):
    folder, metrics = halved[dtype]
    model = onnx_graph.load(folder / "model.onnx")
    values = sum(one.numel() for one in load_model(dense).parameters())
    assert values * 2 < onnx_graph.size_bytes(model) < values * 2 + 10_000
    assert "model.layers.0.self_attn.q_proj.weight" in model.graph.initializers
    past = [one for one in model.graph.inputs if one.name.startswith("past_key_values")]
    assert past and {one.dtype for one in past} == {HALVES[dtype]}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    described = json.loads((folder / "graph.json").read_text())
    assert described["dtype"] == described["cache"]["dtype"] == half_floats.TYPES[described["dtype"]].name.lower()
    assert 0 <= metrics["halving_kl_divergence"] < LIMITS[described["dtype"]] / 10


def test_rotations_and_sums_stay_in_32_bits(halved):
    model = onnx_graph.load(halved["fp16"][0] / "model.onnx")
    assert {node.outputs[0].dtype for node in model.graph if node.op_type in ("MatMul", "Attention")} == {
        HALVES["fp16"]
    }
    angles = [node for node in model.graph if node.op_type in ("Cos", "Sin")]
    assert angles and all(node.inputs[0].dtype in (ir.DataType.FLOAT, None) for node in angles)


def test_graph_in_fp16_answers_as_torch_in_fp16_does(halved, dense):
    ids = token_windows(2, 24)
    found = open_engine(halved["fp16"][0]).logits(ids)
    exact, half = load_model(dense), load_model(dense).half()
    with torch.inference_mode():
        wanted, theirs = (one(input_ids=torch.from_numpy(ids)).logits.float().numpy() for one in (exact, half))
    assert divergence(wanted, found) < 3 * divergence(wanted, theirs) + 1e-7


def test_plan_of_16_bits_keeps_what_it_reads_and_the_processor_takes_none(halved, tmp_path):
    folder, _ = halved["bf16"]
    plan = CompileParams(backend="tensorrt_rtx", architectures=("sm_89",), maximum_tokens=64)
    heard = Hears()
    compile_engine(plan, {"graph": folder}, tmp_path, heard)
    engine = json.loads((tmp_path / "engine.json").read_text())
    assert engine["cache"]["dtype"] == "bfloat16" and len(engine["profiles"]) == 2
    with pytest.raises(StageError, match=r"sm_75 has no bfloat16; .*export in another `dtype`"):
        compile_engine(
            plan.model_copy(update={"backend": "tensorrt", "architectures": ("sm_75",)}),
            {"graph": folder},
            tmp_path,
            heard,
        )
    with pytest.raises(StageError, match="onnxruntime multiplies no bfloat16"):
        compile_engine(CompileParams(backend="onnxruntime"), {"graph": folder}, tmp_path, heard)
    with pytest.raises(StageError, match="computes in float32 on the processor; measured a graph in float16"):
        compile_engine(CompileParams(backend="onnxruntime"), {"graph": halved["fp16"][0]}, tmp_path, heard)


def test_model_whose_numbers_leave_16_bits_is_refused_and_goes_in_bf16(dense, tmp_path):
    """Weights of 10^5 and a norm that takes them back: fp16 ends at 65,504."""
    model = load_model(dense)
    ids = token_windows(1, 16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1e6
        model.model.layers[0].mlp.down_proj.weight /= 1e6
        answer = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    made = onnx_graph.load(whole_graph(dense, tmp_path))
    for name, by in (("up", 1e6), ("down", 1e-6)):
        value = made.graph.initializers[f"model.layers.0.mlp.{name}_proj.weight"]
        value.const_value = ir.tensor((value.const_value.numpy() * by).astype(np.float32), name=value.name)
    path = tmp_path / "model.onnx"
    onnx_graph.save(made, path)
    kept = path.read_bytes()
    with pytest.raises(StageError, match=r"numbers leave what float16 holds; .* Export in bf16"):
        halve(path, "float16", ids, answer, predicts=True)
    path.write_bytes(kept)
    assert halve(path, "bfloat16", ids, answer, predicts=True)[1]["halving_kl_divergence"] < LIMITS["bfloat16"]


def test_numbers_that_leave_fp16_between_two_nodes_are_seen(dense, tmp_path):
    """Every weight fits into 16 bits, a sum of products of two of them does not."""
    model, ids = load_model(dense), token_windows(1, 16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 2000
        model.model.layers[0].mlp.gate_proj.weight *= 50
        model.model.layers[0].mlp.down_proj.weight /= 100_000
        answer = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    made = onnx_graph.load(whole_graph(dense, tmp_path))
    for name, by in (("up", 2000), ("gate", 50), ("down", 1e-5)):
        value = made.graph.initializers[f"model.layers.0.mlp.{name}_proj.weight"]
        value.const_value = ir.tensor((value.const_value.numpy() * by).astype(np.float32), name=value.name)
        assert np.abs(value.const_value.numpy()).max() < 60_000
    path = tmp_path / "model.onnx"
    onnx_graph.save(made, path)
    with pytest.raises(StageError, match=r"numbers leave what float16 holds; measured \d+"):
        halve(path, "float16", ids, answer, predicts=True)


def whole_graph(dense, tmp_path):
    folder = tmp_path / "graph"
    folder.mkdir()
    definition = stage("export")
    definition.run(definition.params(), {"model": dense}, folder, Silent())
    return folder / "model.onnx"
