"""Graphs on the CPU by ONNX Runtime. The only module that imports it.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as vendor

from stages.runtime.contract import DoesNotFit, StageError

VENDOR_ERRORS = (
    vendor.EPFail, vendor.Fail, vendor.InvalidArgument, vendor.InvalidGraph, vendor.InvalidProtobuf, vendor.NoSuchFile,
    vendor.NotImplemented, vendor.RuntimeException,
)  # fmt: skip
_PROCESSOR = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Session:
    """A loaded graph with inputs `input_ids` and `attention_mask` and an output `logits`."""

    session: Any

    def logits(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """logits_NTV; without a mask every token counts.

        Raises:
            StageError: the runtime refuses, with its own text.
            DoesNotFit: memory ran out.
        """
        return self._run(["logits"], ids_NT, np.ones_like(ids_NT) if mask_NT is None else mask_NT)[0]

    def outputs(self, ids_NT: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """Every output of the graph by its name; errors as of `logits`."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self._run(names, ids_NT, np.ones_like(ids_NT)), strict=True))

    def _run(
        self, names: list[str], ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]
    ) -> list[NDArray[np.float32]]:
        try:
            found: list[NDArray[np.float32]] = self.session.run(names, {"input_ids": ids_NT, "attention_mask": mask_NT})
        except VENDOR_ERRORS as error:
            raise _told(error, "run") from error
        return found


def open_session(path: Path, *, literal: bool = False) -> Session:
    """Load a graph.

    Fusion of Q/DQ pairs is off: it would round activations that the graph leaves in float. Dequantized constants are
    folded instead, so that weights behind a DequantizeLinear cost no time per call.

    Args:
        path: model.onnx; external data beside it.
        literal: compute node by node, as the reference of a rewritten graph.

    Raises:
        StageError: the runtime refuses the graph, with its own text.
        DoesNotFit: memory ran out.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if literal else levels.ORT_ENABLE_ALL
    for key, value in {
        "session.disable_quant_qdq": "1",
        "session.qdq_matmulnbits_accuracy_level": "1",
        "session.x64quantprecision": "0" if has_exact_kernels() else "1",
        # Spinning threads take the cores that other work of the machine waits for.
        "session.intra_op.allow_spinning": "0",
    }.items():
        options.add_session_config_entry(key, value)
    try:
        return Session(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
    except VENDOR_ERRORS as error:
        raise _told(error, "load") from error


def threads() -> int:
    """$OMP_NUM_THREADS, which the runtime's own pool does not read, or the processors this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_exact_kernels(processor: Path = _PROCESSOR) -> bool:
    """Whether products of UINT8 and INT8 are exact here.

    x86 without VNNI adds two products in 16 bits, which saturates. Where that cannot be ruled out, the runtime is told
    to make the weights unsigned, which is exact and takes 2.5 times as long.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return True
    return processor.is_file() and "vnni" in processor.read_text(encoding="utf-8")


def _told(error: Exception, verb: str) -> StageError:
    text = str(error).removeprefix("[ONNXRuntimeError] : ").strip()
    kind = DoesNotFit if "Failed to allocate memory" in text or "bad_alloc" in text else StageError
    remedy = "Use fewer or shorter windows, or a larger machine." if kind is DoesNotFit else "Export the graph again."
    if isinstance(error, vendor.NotImplemented):
        remedy = "Take `export` and what follows it out of the recipe, and judge the checkpoint itself."
    return kind(f"ONNX Runtime could not {verb} the graph", measured=text, remedy=remedy)
