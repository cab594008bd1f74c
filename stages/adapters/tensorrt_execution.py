"""Execute a TensorRT plan on a GPU, with memory from the CUDA driver and no other library.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Execution
from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.cuda_driver import DRIVER, loaded

_MAJOR, _MINOR = 75, 76
"""Numbers of CUDA's device attributes for the compute capability."""


class Device:
    """The first GPU, through the CUDA driver's C functions."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            number = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        self.architecture = f"sm_{numbers[0]}{numbers[1]}"

    def call(self, function: str, *arguments: Any) -> None:
        """Call a driver function; raises StageError with its name and code when it fails."""
        code = getattr(self._driver, function)(*arguments)
        if code:
            kind = DoesNotFit if code == 2 else StageError
            raise kind(f"the CUDA driver refused {function}", measured=f"error {code}", remedy="See `nvidia-smi`.")

    def allocate(self, size_bytes: int) -> ctypes.c_void_p:
        """Memory on the device."""
        pointer = ctypes.c_void_p()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size_bytes))
        return pointer

    def release(self, pointer: ctypes.c_void_p) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", pointer)

    def upload(self, array: NDArray[Any]) -> ctypes.c_void_p:
        """A copy of an array on the device."""
        pointer = self.allocate(array.nbytes)
        self.call("cuMemcpyHtoD_v2", pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        return pointer

    def download(self, pointer: ctypes.c_void_p, into: NDArray[Any]) -> None:
        """Fill an array from the device."""
        self.call("cuMemcpyDtoH_v2", into.ctypes.data_as(ctypes.c_void_p), pointer, ctypes.c_size_t(into.nbytes))

    def wait(self) -> None:
        """Until all work is done."""
        self.call("cuCtxSynchronize")


def open_device(backend: str, architectures: Sequence[str], driver: str = DRIVER) -> Device:
    """The GPU that can execute a plan for `architectures`.

    Raises:
        DoesNotFit: there is no driver or GPU, or none of these architectures.
    """
    built = f"{backend} for {', '.join(architectures)}"
    library, missing = loaded(driver)
    if missing:
        raise DoesNotFit(
            f"this engine is compiled, not executed: it is {built}",
            measured=missing,
            remedy="Open it on a machine with such a GPU, or use the onnxruntime engine.",
        )
    device = Device(library)
    if device.architecture not in architectures:
        raise DoesNotFit(
            f"this engine is {built}",
            measured=device.architecture,
            limit=", ".join(architectures),
            remedy=f"Compile with {device.architecture} among the architectures.",
        )
    return device


def execute_plan(plan: Path, backend: str, architectures: Sequence[str], *, verified: bool) -> Execution:
    """A plan, opened.

    Args:
        plan: the serialized engine.
        backend: `tensorrt_rtx` or `tensorrt`.
        architectures: what it was built for.
        verified: its digest stands in a manifest; without that it is not deserialized, since a plan can run code.

    Raises:
        DoesNotFit: no GPU that can execute it.
        StageError: it is not verified, or the library refuses it.
    """
    device = open_device(backend, architectures)
    if not verified:
        raise StageError(
            f"{plan.name} is executable code whose digest nobody checked",
            remedy="Open it from a store, or with verified=True after hashing it against its manifest.",
        )
    trt = import_module(backend)
    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise StageError(f"{backend} refuses {plan.name}", remedy="Compile it with the installed version.")
    context = engine.create_execution_context()

    def run(ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        # The runtime and its logger must outlive the context.
        _ = runtime, logger
        return _infer(device, context, {"input_ids": ids_NT, "attention_mask": mask_NT})

    return Execution(f"{backend}:{device.architecture}", run)


def _infer(device: Device, context: Any, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    held: list[ctypes.c_void_p] = []
    try:
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise StageError(f"the engine takes no {name} of this shape", measured=array.shape)
            held.append(device.upload(np.ascontiguousarray(array)))
            context.set_tensor_address(name, held[-1].value)
        logits_NTV = np.empty(tuple(context.get_tensor_shape("logits")), dtype=np.float32)
        held.append(device.allocate(logits_NTV.nbytes))
        context.set_tensor_address("logits", held[-1].value)
        if not context.execute_async_v3(0):
            raise StageError("the engine failed to execute", remedy="See the GPU's log with `nvidia-smi`.")
        device.wait()
        device.download(held[-1], logits_NTV)
        return logits_NTV
    finally:
        for pointer in held:
            device.release(pointer)
