"""Where models are executed, and which machine and library that is: what a measurement is a fact about."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Literal

from stages.adapters.backends import backend, module_of, processor_targets
from stages.runtime.cuda_driver import gpu_name
from stages.runtime.execute import device_name

CUDA = "torch:cuda"
TORCH = ("torch:cpu", CUDA)
"""Targets of checkpoints."""
if TYPE_CHECKING:
    Target = str
else:
    Target = Literal[(*TORCH, *processor_targets())]


def executor(target: str) -> dict[str, str]:
    """The machine and the library that execute on a target."""
    name = target.partition(":")[0]
    library = name if target in TORCH else backend(name).library
    on_gpu = target == CUDA
    return {
        "target": target,
        "device": (gpu_name() or "no GPU") if on_gpu else device_name(),
        "runtime": f"{library} {importlib.metadata.version(library)}" + (f" CUDA {_cuda_version()}" if on_gpu else ""),
    }


def backend_code(target: str) -> tuple[str, ...]:
    """The module that executes on a target, where the target's name chooses it."""
    return () if target in TORCH else (module_of(target.partition(":")[0]),)


def refuse_unexecuted(target: str, precisions: Collection[str]) -> None:
    """Refuse before any work what a target's backend cannot execute; see `backends.refuse_impossible`."""
    if target not in TORCH:
        backend(target.partition(":")[0]).refuse("", precisions)


def _cuda_version() -> str:
    """The CUDA that torch is built for, read where planning does not load torch itself."""
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    return str(run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] or "none")
