"""The CUDA driver's own C functions: what GPU a machine has, without any library that computes on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

DRIVER = "libcuda.so.1"
_LONGEST_NAME = 256
_MAJOR, _MINOR = 75, 76
"""Numbers of CUDA's device attributes for the compute capability."""


def loaded(driver: str = DRIVER) -> tuple[Any, str]:
    """The driver, ready to be called, and an empty text; without a GPU None, and what was found in its place."""
    try:
        library = ctypes.CDLL(driver)
    except OSError:
        return None, "no CUDA driver"
    if code := library.cuInit(0):
        return None, f"the CUDA driver found no GPU (error {code})"
    return library, ""


def gpu_name(driver: str = DRIVER) -> str:
    """The name of the first GPU of those that CUDA_VISIBLE_DEVICES leaves; empty where there is none."""
    library, _ = loaded(driver)
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_LONGEST_NAME)
    if library is None or library.cuDeviceGet(ctypes.byref(device), 0):
        return ""
    return "" if library.cuDeviceGetName(name, len(name), device) else name.value.decode()


def gpu_architecture(driver: str = DRIVER) -> str:
    """Its architecture, `sm_89`; empty where there is none."""
    library, _ = loaded(driver)
    device = ctypes.c_int()
    if library is None or library.cuDeviceGet(ctypes.byref(device), 0):
        return ""
    return architecture_of(lambda name, *arguments: getattr(library, name)(*arguments), device)


def architecture_of(call: Callable[..., Any], device: ctypes.c_int) -> str:
    """The architecture of a device; `call` calls a driver's function by its name."""
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return f"sm_{numbers[0]}{numbers[1]}"
