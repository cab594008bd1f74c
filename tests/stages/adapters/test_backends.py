"""Backends: one file each, found by its name, asked for its facts where no vendor's library is."""

import subprocess
import sys

import pytest

from stages.adapters.backends import backend, backends, module_of
from stages.adapters.targets import image_on, is_plan, on_gpu, target_of, targets
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import ROOT


def test_backends_are_the_files_and_those_for_the_processor_are_targets():
    files = {path.stem for path in (ROOT / "stages" / "adapters").glob("*_backend.py")}
    assert {f"{name}_backend" for name in backends()} == files
    assert {"tensorrt_rtx", "tensorrt", "onnxruntime"} <= set(backends())
    assert {"torch:cpu", "torch:cuda", "onnxruntime:cpu", "tensorrt_rtx:sm_89", "tensorrt:sm_90"} <= set(targets())
    assert not {"tensorrt_rtx:cpu", "tensorrt:cpu", "onnxruntime:sm_89"} & set(targets())
    assert backend("onnxruntime").architectures == () and "sm_90" in backend("tensorrt").architectures


@pytest.mark.parametrize("name", ["abacus", "", "..onnxruntime", "onnxruntime.x", "s3_store"])
def test_unknown_backend_is_refused_with_those_that_there_are(name):
    with pytest.raises(StageError, match="there is no backend") as caught:
        module_of(name)
    assert caught.value.limit == ", ".join(backends())


def test_facts_are_known_without_any_library():
    code = (
        "import sys; from stages.adapters.targets import targets; targets();"
        "names = ('numpy', 'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt', 'tensorrt_rtx');"
        "print(*[name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_plan_is_executed_by_the_gpu_that_it_is_for_and_an_engine_for_the_processor_by_that():
    assert target_of("onnxruntime", (), "sm_89") == "onnxruntime:cpu"
    assert target_of("tensorrt_rtx", ("sm_86", "sm_89"), "sm_89") == "tensorrt_rtx:sm_89"
    assert target_of("tensorrt_rtx", ("sm_86",), "sm_89") == target_of("tensorrt_rtx", ("sm_86",), "") == ""
    assert {one: (on_gpu(one), is_plan(one), image_on(one).value) for one in targets() if "sm_1" not in one} == {
        "torch:cpu": (False, False, "torch"),
        "torch:cuda": (True, False, "torch"),
        "onnxruntime:cpu": (False, False, "torch"),
    } | {one: (True, True, "gpu") for one in targets() if "sm_" in one and "sm_1" not in one}
