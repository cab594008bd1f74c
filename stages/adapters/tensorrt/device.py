"""The first GPU and its memory, through the CUDA driver's C functions and no other library."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.cuda_driver import DRIVER, architecture_of, loaded


class Device:
    """The first GPU, through the CUDA driver's C functions."""

    def __init__(self, driver: Any) -> None:
        self._driver, self._here = driver, threading.local()
        self._context: ctypes.c_void_p | None = None
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self.architecture = architecture_of(self.call, device)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a driver function; raises StageError with its name and code when it fails."""
        # The driver knows it by thread, and who serves a plan executes it in another than it was opened in.
        if self._context is not None and not hasattr(self._here, "current"):
            self._checked("cuCtxSetCurrent", self._context)
            self._here.current = True
        self._checked(function, *arguments)

    def _checked(self, function: str, *arguments: Any) -> None:
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

    def zeros(self, size_bytes: int) -> ctypes.c_void_p:
        """Memory on the device that holds zeros."""
        pointer = self.allocate(size_bytes)
        with self._given_back(pointer):
            self.call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(size_bytes))
        return pointer

    def upload(self, array: NDArray[Any]) -> ctypes.c_void_p:
        """A copy of an array on the device."""
        pointer = self.allocate(array.nbytes)
        with self._given_back(pointer):
            self.fill(pointer, array)
        return pointer

    @contextmanager
    def _given_back(self, pointer: ctypes.c_void_p) -> Iterator[None]:
        """Within it, memory is given back where what it is for fails."""
        try:
            yield
        except StageError:
            self.release(pointer)
            raise

    def fill(self, pointer: ctypes.c_void_p, array: NDArray[Any]) -> None:
        """Copy an array into memory on the device."""
        self.call("cuMemcpyHtoD_v2", pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))

    def copy(self, pointer: ctypes.c_void_p, source: ctypes.c_void_p, size_bytes: int) -> None:
        """Copy memory on the device."""
        self.call("cuMemcpyDtoD_v2", pointer, source, ctypes.c_size_t(size_bytes))

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

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
