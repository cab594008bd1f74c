"""A GPU as the place where torch computes a checkpoint's answers: in float32, and the same ones each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.cuda_driver import loaded

CPU, CUDA = "cpu", "cuda"
_ELSEWHERE = "Set `target` to torch:cpu"


def require_gpu() -> None:
    """Raise DoesNotFit where torch has no GPU to compute on."""
    if torch.version.cuda is None:
        found = f"torch {torch.__version__}, which is built without CUDA"
    else:
        _, missing = loaded()
        found = missing or ("" if torch.cuda.is_available() else f"none that torch {torch.__version__} can use")
    if found:
        raise DoesNotFit(
            "torch:cuda is a GPU, and there is none here",
            measured=found,
            limit="an NVIDIA GPU, its driver, and torch built for CUDA",
            remedy=f"{_ELSEWHERE}, or run it on a machine with such a GPU.",
        )


@contextmanager
def exactly() -> Iterator[None]:
    """Within it, torch multiplies float32 as float32 on a GPU, and only by functions that give the same bits again.

    Raises:
        DoesNotFit: the GPU's memory ran out.
        StageError: the model does what torch has no such function for.
    """
    # cuBLAS looks for it at its first product, and is not bound to the same sums without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at run time
    before = products.fp32_precision, convolutions.fp32_precision, torch.are_deterministic_algorithms_enabled()
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            "the GPU's memory ran out",
            measured=f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB in use",
            limit=f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB",
            remedy=f"Use shorter windows or a larger GPU, or s{_ELSEWHERE[1:]}.",
        ) from error
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise StageError(
            "the model does what a GPU has no repeatable way to do",
            measured=str(error).splitlines()[0],
            remedy=f"{_ELSEWHERE}.",
        ) from error
    finally:
        products.fp32_precision, convolutions.fp32_precision = before[:2]
        torch.use_deterministic_algorithms(before[2])
