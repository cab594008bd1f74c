"""TensorRT-RTX: one plan for several architectures, built where no GPU is; `tensorrt_backend` has what both do."""

from __future__ import annotations

from stages.adapters.tensorrt_backend import made

BACKEND = made(
    "tensorrt_rtx",
    ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    lacks={"sm_75": "float32"},
)
