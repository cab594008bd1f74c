"""Import transformers without what no stage uses of it."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

UNUSED = ("scipy", "sklearn")
"""transformers imports them where they are installed, for losses of detection and for assisted generation: a tenth of
the memory that a stage has before it begins, and a second."""


def import_transformers() -> None:
    """Import what every stage needs of transformers as if `UNUSED` were not installed; they can be imported later.

    Only for a process whose purpose is a stage: transformers remembers what it found.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in UNUSED if name not in modules]
    for name in hidden:
        modules[name] = None  # the import system's way of saying that there is none
    try:
        import_module("transformers.modeling_utils")
    finally:
        for name in hidden:
            del modules[name]
