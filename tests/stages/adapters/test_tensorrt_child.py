"""The child that builds plans: what it says arrives, and its crash, its death and its delay are told."""

import json
import os
import subprocess
import sys
import time

import onnx
import pytest
from onnx import TensorProto, helper

from stages.adapters.tensorrt import child as tensorrt_child
from stages.adapters.tensorrt.build import Shapes
from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.peak_memory import peak_rss_bytes
from tests.engines import Hears

SMALL = Shapes(maximum_batch=2, maximum_tokens=8)


def library(folder, monkeypatch, body):
    """A library of the name `odd_library`, whose import does what `body` says."""
    (folder / "odd_library.py").write_text(f"import os, signal, time\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")])))


def build(folder, backend="odd_library", heard=None):
    tensorrt_child.build(folder / "model.onnx", backend, ["sm_89"], SMALL, folder / "model.plan", heard or Hears())


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", StageError, "odd_library crashed while it built.*measured SIGSEGV"),
        ("os._exit(7)", StageError, "crashed while it built the engine; measured exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", DoesNotFit, "was ended while it built.*SIGKILL.*memory runs out"),
    ],
)
def test_builder_that_dies_is_told_in_four_parts(tmp_path, monkeypatch, body, kind, said):
    library(tmp_path, monkeypatch, body)
    with pytest.raises(kind, match=said):
        build(tmp_path)


def test_builder_that_never_ends_is_ended_at_its_limit(tmp_path, monkeypatch):
    library(tmp_path, monkeypatch, "time.sleep(600)")
    monkeypatch.setenv("ENGINERY_BUILD_MINUTES", "0.02")
    began = time.monotonic()
    with pytest.raises(DoesNotFit, match=r"limit 0\.02 minutes\. Set \$ENGINERY_BUILD_MINUTES higher"):
        build(tmp_path)
    assert time.monotonic() - began < 30


def test_limit_that_is_no_number_is_refused(tmp_path, monkeypatch):
    for wrong in ("soon", "0", "nan"):
        monkeypatch.setenv("ENGINERY_BUILD_MINUTES", wrong)
        with pytest.raises(StageError, match=r"ENGINERY_BUILD_MINUTES is no number of minutes"):
            build(tmp_path)


def test_builders_refusal_arrives_with_the_node_and_a_missing_library_with_its_remedy(tmp_path):
    value = helper.make_tensor_value_info
    node = helper.make_node("StringNormalizer", ["input_ids"], ["y"], name="model.layers.3.mlp/Odd_7")
    graph = helper.make_graph(
        [node], "g", [value("input_ids", TensorProto.FLOAT, ["n", "t"])], [value("y", TensorProto.FLOAT, None)]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
              tmp_path / "model.onnx")  # fmt: skip
    with pytest.raises(StageError, match=r"cannot read the graph; measured .*model\.layers\.3\.mlp/Odd_7"):
        build(tmp_path, "tensorrt_rtx")
    with pytest.raises(DoesNotFit, match="pip install no-such-library`"):
        build(tmp_path, "no_such_library")
    assert not (tmp_path / "model.plan").exists()


def test_plan_progress_and_memory_arrive(tmp_path):
    value = helper.make_tensor_value_info
    node = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [node], "g", [value("input_ids", TensorProto.INT64, ["n", "t"])],
        [value("logits", TensorProto.FLOAT, ["n", "t"])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
              tmp_path / "model.onnx")  # fmt: skip
    heard, before = Hears(), peak_rss_bytes()
    build(tmp_path, "tensorrt_rtx", heard)
    assert peak_rss_bytes() > before + 50_000_000  # the library alone takes more, and not in this process
    assert (tmp_path / "model.plan").stat().st_size > 1000
    assert heard.fractions == sorted(heard.fractions) and heard.fractions[-1] == 1


def test_whoever_interrupts_takes_the_child_along(tmp_path, monkeypatch):
    library(tmp_path, monkeypatch, "import sys\nsys.stdout.flush()\ntime.sleep(600)")
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(tensorrt_child.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0])

    def interrupted(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_child, "_heard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert started[0].returncode == -9


def test_child_without_a_parent_gives_up(tmp_path, monkeypatch):
    library(tmp_path, monkeypatch, "")
    asked = {"graph": "x", "backend": "no_such_library", "architectures": [], "target": "y",
             "shapes": {"maximum_batch": 1, "maximum_tokens": 1}}  # fmt: skip
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", tensorrt_child.__name__], input=json.dumps(asked).encode(),
                          stdout=write, check=False, stderr=subprocess.PIPE)  # fmt: skip
    os.close(write)
    assert done.returncode == 130
