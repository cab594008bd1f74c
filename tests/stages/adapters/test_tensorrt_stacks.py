"""Plans of an encoder and a decoder: built by the library, and executed by ONNX Runtime in memory of this process.

What is executed are the graphs that the builder was given, and the driver is the stand-in of the decoders' plans.
"""

import ctypes
import gc
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from stages import stage
from stages.adapters.tensorrt import build as tensorrt_build
from stages.adapters.tensorrt import child
from stages.adapters.tensorrt.build import DECODE, PREFILL, Shapes
from stages.compile.stage import CompileParams, compile_engine
from stages.export.stage import ExportParams, export
from stages.graphs import components, onnx_graph
from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.progress import Silent
from stages.serving.engine import open_engine
from stages.serving.generate import padded
from stages.serving.inputs import encoded
from tests.engines import Hears
from tests.stages.adapters.gpus import Driver, Engine
from tests.stages.validate.test_written import SOURCES
from tests.stages.validate.words import lively

PLACES, BATCH = 24, 2
ROWS = [[5, 6, 7], [9, 8, 12, 13, 30], [11, 12, 13, 14, 15, 16, 17]]
PARAMS = CompileParams(backend="tensorrt_rtx", architectures=("sm_89",), maximum_tokens=PLACES, maximum_batch=BATCH)


@pytest.fixture(scope="module", params=["t5 in INT8", pytest.param("bart", marks=pytest.mark.fault)])
def made(request, tmp_path_factory):
    """A checkpoint, its graph, and an engine whose plans are the graphs that their builder is given."""
    root, (name, *in_few_bits) = tmp_path_factory.mktemp("stacks"), request.param.split()
    for folder in ("small", "graph", "engine"):
        (root / folder).mkdir()
    checkpoint = lively(name, root)
    if in_few_bits:
        quantize = stage("quantize")
        given = quantize.params.model_validate({"scheme": "int8_weight_only"})
        quantize.run(given, {"model": checkpoint}, root / "small", Silent())
        checkpoint = root / "small"
    export(ExportParams(parity_tokens=24), {"model": checkpoint}, root / "graph", Silent())

    def copied(graph, _backend, _architectures, _shapes, target, progress):
        target.write_bytes(graph.read_bytes())
        progress.advanced(1, 1)

    heard = Hears()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "build", copied)
        metrics = compile_engine(PARAMS, {"graph": root / "graph"}, root / "engine", heard)
    asked = open_engine(checkpoint)
    wanted = asked.generate(list(SOURCES), max_new_tokens=12), asked.forward(*padded(ROWS))
    searched = asked.generate(list(SOURCES), max_new_tokens=12, beams=3)
    return SimpleNamespace(
        wanted=wanted, searched=searched, graph=root / "graph", engine=root / "engine", metrics=metrics, heard=heard
    )


@pytest.fixture
def machine(made, monkeypatch):
    """A machine with an sm_89 GPU that has room, and the engines that were opened on it."""
    driver, engines = Driver(), []

    def deserialized(data):
        engines.append(Engine(data, Shapes(maximum_batch=BATCH, maximum_tokens=PLACES)))
        return engines[-1]

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialized)
    library = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}), Runtime=lambda _logger: runtime
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(tensorrt_build, "MOST_ASKED", 4)
    return SimpleNamespace(driver=driver, engines=engines)


def test_texts_of_unequal_length_are_answered_as_by_the_checkpoint(made, machine):
    wanted, _ = made.wanted
    opened = open_engine(made.engine, verified=True)
    assert opened.target == "tensorrt_rtx:sm_89" and opened.maximum_tokens == PLACES
    assert opened.generate(list(SOURCES), max_new_tokens=12) == wanted
    assert len(set(wanted)) > 1
    decoder, encoder = machine.engines
    texts = [len(encoded(opened.tokenizer, opened.chat, one)) for one in SOURCES]
    groups = [max(texts[0:2]), max(texts[2:4]), texts[4]]
    assert encoder.ran == [(0, (rows, longest)) for rows, longest in zip((2, 2, 1), groups, strict=True)]
    assert decoder.ran[:3] == [(DECODE, (rows, 1)) for rows in (2, 2, 1)] and {one for one, _ in decoder.ran} == {
        DECODE
    }
    gc.collect()
    assert not machine.driver.memory


def test_beams_take_their_texts_and_what_was_said_with_them(made, machine):
    opened = open_engine(made.engine, verified=True)
    assert opened.generate(list(SOURCES), max_new_tokens=12, beams=3) == made.searched
    gc.collect()
    assert not machine.driver.memory


def test_answers_themselves_are_read_in_parts_and_leave_no_memory(made, machine):
    _, wanted = made.wanted
    found = open_engine(made.engine, verified=True).forward(*padded(ROWS))
    kept_NT = padded(ROWS)[1] > 0
    np.testing.assert_allclose(found[kept_NT], wanted[kept_NT], atol=1e-3 * wanted.std())
    assert not found[~kept_NT].any()
    assert machine.engines[0].ran[:4] == [(PREFILL, (2, 4)), (PREFILL, (1, 4)), (PREFILL, (2, 3)), (PREFILL, (1, 3))]
    gc.collect()
    assert not machine.driver.memory


def test_what_the_plans_have_no_room_for_is_refused_and_leaves_no_memory(made, machine):
    opened = open_engine(made.engine, verified=True)
    with pytest.raises(StageError, match="longer than the model reads; measured 25 tokens; limit 24 tokens"):
        opened.generate([[5] * 25])
    for tokens, why in ((25, r"takes no input_ids of this shape; measured \(1, 25\)"), (5, "longer than the cache")):
        ids, said = np.full((1, tokens), 5), np.full((1, 25), 5)
        with pytest.raises(StageError, match=why):
            opened.steps().stacks.begin(ids, np.ones_like(ids), 1).read(said)
        gc.collect()
        assert not machine.driver.memory
    machine.driver.free_bytes = 256 << 20
    with pytest.raises(DoesNotFit, match=r"1 texts of 24 tokens need \d+ MB; limit 0 MB"):
        opened.generate(["the cat sat"])
    machine.driver.free_bytes = 1 << 40
    machine.driver.failing, machine.driver.code = "cuMemcpyHtoD_v2", 1
    with pytest.raises(StageError, match="refused cuMemcpyHtoD_v2"):
        opened.generate(["the cat sat"])
    gc.collect()
    assert not machine.driver.memory


def test_description_says_what_each_plan_takes_gives_and_is_built_for(made):
    described = json.loads((made.engine / "engine.json").read_text())
    assert (described["target"], described["executed"], described["executable"]) == (
        "tensorrt_rtx:sm_89", False, "model.plan"
    )  # fmt: skip
    assert {name: one["file"] for name, one in described["components"].items()} == {
        "encoder": "encoder.plan", "decoder": "model.plan"
    }  # fmt: skip
    for part in described["components"].values():
        graph = onnx_graph.load(made.engine / part["file"]).graph
        assert [one.name for one in graph.inputs] == part["inputs"]
        assert [one.name for one in graph.outputs] == part["outputs"]
    (reading,) = described["components"]["encoder"]["profiles"]
    rows, text = [1, BATCH], [1, PLACES]
    assert reading == {"name": "read", "number": 0, "rows": rows, "text_tokens": text}
    assert [(one["name"], one["number"], one["new_tokens"]) for one in described["profiles"]] == [
        ("prefill", 0, text), ("decode", 1, [1, 1])
    ]  # fmt: skip
    assert all(one["rows"] == rows and one["text_tokens"] == text for one in described["profiles"])
    assert described["cache"]["maximum"] == PLACES and described["answers"]["wraps"] is False
    assert made.heard.fractions == sorted(made.heard.fractions) and made.heard.fractions[-1] == 1


def test_weights_that_both_plans_read_are_counted_once(made):
    held = onnx_graph.held(*components.load(made.graph / "model.onnx")).size_bytes
    assert abs(made.metrics["weights_bytes"] - held) < 4096  # constants laid out for the builder
    files = [made.engine / name for name in ("model.plan", "encoder.plan")]
    assert made.metrics["size_bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.fault
def test_library_builds_both_plans_and_holds_each_weight_once_but_the_table_that_both_read(made, tmp_path):
    heard, models = Hears(), components.load(made.graph / "model.onnx")
    metrics = compile_engine(PARAMS, {"graph": made.graph}, tmp_path, heard)
    assert {path.name for path in tmp_path.glob("*.plan")} == {"model.plan", "encoder.plan"}
    assert json.loads((tmp_path / "engine.json").read_text())["cache"]["maximum"] == PLACES
    assert metrics["besides_weights_bytes"] < 2 * 24_000_000
    decoder, encoder = ({name: one.const_value for name, one in m.graph.initializers.items()} for m in models)
    tables = [encoder[name] for name in encoder.keys() & decoder.keys() if encoder[name].nbytes >= 4096]
    # So small a table the exporter turns over and keeps in both orders.
    again = [
        name
        for name, one in decoder.items()
        for table in tables
        if any(np.array_equal(one.numpy(), way) for way in (table.numpy(), table.numpy().T))
    ]
    assert metrics["stored_again_bytes"] == sum(decoder[name].nbytes for name in again)
    assert all(any(name in note for note in heard.notes) for name in again)
