"""Where models are executed, and which machine and library that is: what a measurement is a fact about."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Literal

from stages.adapters.backends import backend, backends, module_of
from stages.runtime.contract import Image, StageError
from stages.runtime.cuda_driver import gpu_name
from stages.runtime.execute import device_name

CPU, CUDA = "torch:cpu", "torch:cuda"
TORCH = (CPU, CUDA)
"""Targets of checkpoints."""


def targets() -> tuple[str, ...]:
    """Everything that executes models: torch, engines for the processor, and each GPU that plans are built for."""
    return (*TORCH, *(f"{name}:{one}" for name in backends() for one in backend(name).architectures or ("cpu",)))


if TYPE_CHECKING:
    Target = str
else:
    Target = Literal[targets()]


def on_gpu(target: str) -> bool:
    """Whether a target is a GPU."""
    return target == CUDA or is_plan(target)


def is_plan(target: str) -> bool:
    """Whether a target is a GPU that executes plans."""
    return target not in TORCH and bool(backend(target.partition(":")[0]).architectures)


def target_of(name: str, architectures: Sequence[str], gpu: str) -> str:
    """What executes an engine.

    Args:
        name: of its backend.
        architectures: GPUs that it is for, none for the processor.
        gpu: the architecture of the GPU that there is, empty for none.

    Returns:
        `onnxruntime:cpu`, `tensorrt_rtx:sm_89`, ...; empty where it is for other GPUs.
    """
    if not architectures:
        return f"{name}:cpu"
    return f"{name}:{gpu}" if gpu in architectures else ""


def executor(target: str) -> dict[str, str]:
    """The machine and the library that execute on a target.

    Raises:
        StageError: the library is not installed.
    """
    name = target.partition(":")[0]
    library = name if target in TORCH else backend(name).library
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError as error:
        raise StageError(
            f"{target} is executed by {library}, which is not installed",
            remedy=f"Install {library}, or take what asks for {target} out of the recipe.",
        ) from error
    return {
        "target": target,
        "device": (gpu_name() or "no GPU") if on_gpu(target) else device_name(),
        "runtime": f"{library} {version}" + (f" CUDA {torch_cuda()}" if target == CUDA else ""),
    }


def backend_code(target: str) -> tuple[str, ...]:
    """The module that executes on a target, where the target's name chooses it."""
    return () if target in TORCH else (module_of(target.partition(":")[0]),)


def refuse_unexecuted(target: str, precisions: Collection[str]) -> None:
    """Refuse before any work what a target's backend cannot execute; see `backends.refuse_impossible`."""
    if target not in TORCH:
        name, _, architecture = target.partition(":")
        backend(name).refuse(architecture if is_plan(target) else "", precisions)


def takes_turns(target: str) -> bool:
    """Whether a checkpoint can be timed beside what is executed there: torch must compute on the same GPU."""
    return not is_plan(target) or torch_cuda() != "none"


def image_on(target: str) -> Image:
    """What the image that measures on a target must hold: where plans are executed, TensorRT beside torch."""
    return Image.GPU if is_plan(target) else Image.TORCH


@cache
def torch_cuda() -> str:
    """The CUDA that torch is built for or `none`, read where planning does not load torch itself."""
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    return str(run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] or "none")
