"""Import a large library in less time: without what it loads only because it is installed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without(*names: str) -> Iterator[None]:
    """While it lasts modules of these names seem not to be installed, unless they are loaded; nor is garbage collected.

    What is imported stays, so that to look for garbage among it costs a fifth of the time and finds none. Whoever is
    refused a module is so in every thread: the names must be of those that nothing else here imports.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in names if name not in modules]
    for name in hidden:
        modules[name] = None  # the import system's way of saying that there is none
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
        if collecting:
            gc.enable()
