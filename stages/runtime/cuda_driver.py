"""The CUDA driver's own C functions: what GPU a machine has, without any library that computes on it."""

from __future__ import annotations

import ctypes
from typing import Any

DRIVER = "libcuda.so.1"
_LONGEST_NAME = 256


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
