"""Import transformers without what no stage uses."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from stages.runtime.lean_imports import uncollected, without

UNUSED = ("scipy", "sklearn")
"""transformers imports them where they are installed, for losses of detection and for assisted generation: a tenth of
the memory that a stage has before it begins, and a second."""
_NEEDED = ("transformers.modeling_utils", "transformers.masking_utils")
"""Also of transformers' modules those that name the compiler at their top, and that every model's own module needs."""
_COMPILER = "torch._dynamo"


def import_transformers() -> None:
    """Import what every stage needs of transformers, in less than half of the time.

    It finds no `UNUSED`, a torch that was built without `torch.distributed`, and a torch compiler that does nothing
    with the functions that are marked for it; all of them can be imported later. A stage computes in one process, and
    what it exports it traces, not compiles.

    Only for a process whose purpose is a stage: transformers remembers what it found.
    """
    with uncollected(), without(*UNUSED), _undistributed(), without_compiler():
        for name in _NEEDED:
            import_module(name)
    gc.freeze()


@contextmanager
def _undistributed() -> Iterator[None]:
    import torch

    with patch.object(torch.distributed, "is_available", lambda: False):
        from transformers.utils import is_torch_distributed_available

        is_torch_distributed_available()  # keeps the answer
        yield


@contextmanager
def without_compiler() -> Iterator[None]:
    """While it lasts the marks of torch's compiler leave functions as they are, unless it is loaded already.

    To load it takes as long as half of torch does, and what is not compiled needs no mark.
    """
    import torch

    modules: dict[str, Any] = sys.modules
    if _COMPILER in modules:
        yield
        return
    modules[_COMPILER] = stand_in = _Unmarking(_COMPILER)
    stand_in.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # single modules of it are used as they are
    try:
        with patch.object(torch, "_dynamo", modules[_COMPILER], create=True):
            yield
    finally:
        del modules[_COMPILER]


class _Unmarking(ModuleType):
    """Stands for the compiler: whatever it is asked for is a decorator that does nothing, with options or without."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unmarked


def _unmarked(function: Any = None, *_options: Any, **_named: Any) -> Any:
    return _unmarked if function is None else function
