"""Import a large library in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """While it lasts no garbage is looked for: what is imported stays, and the look costs a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """While it lasts modules of these names seem not to be installed, unless they are loaded; in every thread."""
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in names if name not in modules]
    for name in hidden:
        modules[name] = None  # the import system's way of saying that there is none
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
