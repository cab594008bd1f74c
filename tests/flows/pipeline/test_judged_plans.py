"""A plan is judged and promoted where a GPU is that it is for; the GPU is memory of this process."""

import ctypes
import json
import os
import shutil
import sys
from types import SimpleNamespace

import onnx
import pytest

from flows.pipeline.champion import facing
from flows.pipeline.drive import optimize
from flows.recipe.expand import expanded
from flows.recipe.model import CHAMPION
from flows.recipe.read import load_recipe
from flows.registry.journal import head
from flows.settings import Settings
from stages.adapters.connect import connect
from stages.adapters.tensorrt import child
from stages.adapters.tensorrt.build import Shapes
from stages.graphs import plan_checks
from stages.runtime.contract import StageError
from tests.flows.pipeline.tiny_run import Heard
from tests.flows.recorded import migrated
from tests.stages.adapters.gpus import Driver, Engine

RECIPE = """\
recipe: 1
name: planned
steps:
  - {name: dense, stage: fetch, params: {source: SOURCE}}
  - {name: text, stage: corpus, params: {source: "pydoc://topics", splits: {calibrate: 0.1, test: 0.1}}}
  - {name: int8, stage: quantize, inputs: {model: dense, text: text}, params: {scheme: int8_weight_only}}
  - {name: graph, stage: export, inputs: {model: int8}}
  - name: gpu
    stage: compile
    inputs: {graph: graph}
    params: {backend: tensorrt_rtx, architectures: [sm_89, sm_120], maximum_tokens: 64}
  - {name: cpu, stage: compile, inputs: {graph: graph}, params: {backend: onnxruntime}}
judge: {artifacts: [cpu, gpu], baseline: dense, corpora: [text], window_tokens: 48, windows: 4}
gates:
  - {measure: perplexity, against: dense, at_most: 1.2}
register: {model: MODEL}
"""
BATCH, TOKENS = 8, 64


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where all runs seal, so that each does what it alone does."""
    root = tmp_path_factory.mktemp("planned")
    shutil.copy(migrated(), root / "mlflow.db")
    return root


@pytest.fixture
def machine(root, monkeypatch):
    """A machine with a GPU and a library that executes as a plan the graph that it was built of."""

    def built(graph, _library, _architectures, shapes, target, _progress):
        assert (shapes.maximum_batch, shapes.maximum_tokens) == (BATCH, TOKENS)
        target.write_bytes(onnx.load(graph).SerializeToString())

    shapes = Shapes(maximum_batch=BATCH, maximum_tokens=TOKENS)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: Engine(data, shapes))
    library = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}), Runtime=lambda _logger: runtime
    )
    found, opened = SimpleNamespace(driver=Driver()), ctypes.CDLL
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name, **how: found.driver if "cuda" in str(name) else opened(name, **how)
    )
    monkeypatch.setattr(child, "build", built)
    monkeypatch.setattr(plan_checks, "measure", lambda *_: {})  # the file is no plan
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    # Its answers are asked for in a process that has no such GPU.
    monkeypatch.setattr("flows.pipeline.finish.proved", lambda session, registry, candidate, result: result)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    before = dict(os.environ)
    yield found
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def asked(root, tiny, *sets, model="planned"):
    path = root / "recipe.yaml"
    path.write_text(RECIPE.replace("SOURCE", str(tiny)).replace("MODEL", model), encoding="utf-8")
    return expanded(load_recipe(path, sets))


def ran(root, tiny, *sets, model="planned"):
    return optimize(
        asked(root, tiny, *sets, model=model), Settings(store=str(root / "store"), launcher="inline"), Heard()
    )


def test_plan_is_judged_where_its_gpu_is_and_only_for_that(machine, tiny, root):
    result = ran(root, tiny)
    assert result.passed
    assert result.executed == ["cpu on onnxruntime:cpu", "gpu on tensorrt_rtx:sm_89"]
    assert result.compiled == ["gpu for tensorrt_rtx:sm_120"]
    gates = {gate.artifact: gate for gate in result.gates}
    assert gates["gpu"].target == "tensorrt_rtx:sm_89" and gates["cpu"].target == "onnxruntime:cpu"
    assert gates["gpu"].measured == pytest.approx(gates["cpu"].measured, rel=1e-3)
    store = connect(str(root / "store"))
    (step,) = [one for one in result.steps if one.measures == "gpu"]
    work = store.manifest(step.fingerprint).work
    assert work.executor["target"] == "tensorrt_rtx:sm_89" and work.executor["device"] == "a GPU"
    report = json.loads((store.checkout(step.fingerprint) / "report.json").read_text())
    assert report["artifact_target"] == "tensorrt_rtx:sm_89" and "kl_divergence" in report["measures"]
    promoted = head(store.objects, "planned", "champion").candidate
    assert promoted.targets == {
        "onnxruntime:cpu": "judged",
        "tensorrt_rtx:sm_89": "judged",
        "tensorrt_rtx:sm_120": "compiled, not judged",
    }
    assert promoted.serves == "cpu"

    machine.driver = Driver(failing="cuInit", code=100)
    again = ran(root, tiny)
    assert again.executed == ["cpu on onnxruntime:cpu"]
    assert again.compiled == ["gpu for tensorrt_rtx:sm_89+sm_120"]
    assert not [one for one in again.steps if one.measures == "gpu"]


def test_plan_that_answers_otherwise_fails_its_gate_though_the_processors_engine_is_right(machine, tiny, root):
    honest = child.build

    def broken(graph, library, architectures, shapes, target, progress):
        honest(graph, library, architectures, shapes, target, progress)
        model = onnx.load_from_string(target.read_bytes())
        for one in model.graph.initializer:
            if one.data_type == onnx.TensorProto.INT8 and len(one.raw_data) > 4096:
                one.raw_data = one.raw_data[::-1]
                break
        target.write_bytes(model.SerializeToString())

    child.build = broken
    try:
        result = ran(root, tiny, "steps.gpu.params.architectures=[sm_89]", model="broken")
    finally:
        child.build = honest
    assert {gate.artifact: gate.passed for gate in result.gates} == {"cpu": True, "gpu": False}
    assert not result.passed and result.model is None


def test_gate_against_a_champion_that_is_a_plan_needs_its_gpu(machine, tiny, root):
    alone = ran(root, tiny, "judge.artifacts=[gpu]", model="alone")
    assert alone.model.targets == ["tensorrt_rtx:sm_89"]
    gates = "gates=[{measure: perplexity, at_most: 1e9}, {measure: perplexity, against: champion, at_most: 1.1}]"
    again = asked(root, tiny, gates, model="alone")
    machine.driver = Driver((9, 0))
    elsewhere = asked(root, tiny, gates, model="alone")
    store = connect(str(root / "store"))
    (champion,) = [one for one in facing(again, store) if one.measures == CHAMPION]
    assert champion.params["target"] == "tensorrt_rtx:sm_89"
    with pytest.raises(StageError, match=r"a plan that no GPU here executes.*measured sm_90; limit tensorrt_rtx:sm_89"):
        facing(elsewhere, store)
