"""Engines for the processor by ONNX Runtime: the graph with its integer products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from stages.adapters.backends import ENCODER, Asked, Backend, Execution
from stages.runtime.contract import Metrics, Progress, StageError

GRAPH = "model.onnx"


def refuse(architecture: str, precisions: Collection[str]) -> None:
    """It has no kernel for four-bit floats, nor for bfloat16."""
    if "bfloat16" in precisions:
        raise StageError(
            "onnxruntime multiplies no bfloat16",
            measured="a graph in bfloat16",
            limit="float32, float16",
            remedy="Export in another `dtype`, or leave it to TensorRT.",
        )
    if "fp4" in precisions:
        raise StageError(
            "onnxruntime multiplies no fp4",
            measured="a graph with fp4 weights",
            limit="tensorrt_rtx or tensorrt from sm_100 on",
            remedy="Choose such a backend, or quantize by another scheme.",
        )


def build(asked: Asked, output: Path, progress: Progress) -> Metrics:
    """Write the lowered graph."""
    return asked.lower(asked.graph, output / GRAPH)


def execute(executable: Path, architectures: Sequence[str], verified: bool) -> Execution:
    """A session; a graph holds no code, so nobody need have verified it."""
    from stages.adapters.onnxruntime import CachedSession, open_session
    from stages.adapters.onnxruntime_slots import RowSlots, StackSlots, Stepping, open_stacks

    if executable.with_name(ENCODER).is_file():
        stacks = open_stacks(executable)
        return Execution("onnxruntime:cpu", None, slots=partial(StackSlots, stacks), stacks=stacks)
    opened = open_session(executable)
    if not isinstance(opened, CachedSession):
        return Execution("onnxruntime:cpu", opened.logits, tells_segments=opened.tells_segments)
    return Execution("onnxruntime:cpu", opened.logits, partial(Stepping, opened), partial(RowSlots, opened))


BACKEND = Backend(library="onnxruntime", executable=GRAPH, build=build, execute=execute, keeps=True, refuse=refuse)
