"""Backends: one file each, found by its name, asked for its facts where no vendor's library is."""

import subprocess
import sys

import pytest

from stages.adapters.backends import backend, backends, module_of, processor_targets
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import ROOT


def test_backends_are_the_files_and_those_for_the_processor_are_targets():
    files = {path.stem for path in (ROOT / "stages" / "adapters").glob("*_backend.py")}
    assert {f"{name}_backend" for name in backends()} == files
    assert {"tensorrt_rtx", "tensorrt", "onnxruntime"} <= set(backends()) and "onnxruntime:cpu" in processor_targets()
    assert not {"tensorrt_rtx:cpu", "tensorrt:cpu"} & set(processor_targets())
    assert backend("onnxruntime").architectures == () and "sm_90" in backend("tensorrt").architectures


@pytest.mark.parametrize("name", ["abacus", "", "..onnxruntime", "onnxruntime.x", "s3_store"])
def test_unknown_backend_is_refused_with_those_that_there_are(name):
    with pytest.raises(StageError, match="there is no backend") as caught:
        module_of(name)
    assert caught.value.limit == ", ".join(backends())


def test_facts_are_known_without_any_library():
    code = (
        "import sys; from stages.adapters.backends import processor_targets; processor_targets();"
        "names = ('numpy', 'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt', 'tensorrt_rtx');"
        "print(*[name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
