"""The table of stages: one line a stage. A definition is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from stages.runtime.contract import Stage, StageError

STAGES = {
    "fetch": "stages.fetch:FETCH",
    "corpus": "stages.corpus.stage:CORPUS",
    "fuse": "stages.fuse.stage:FUSE",
    "share": "stages.share:SHARE",
    "prune": "stages.prune.stage:PRUNE",
    "factorize": "stages.factorize:FACTORIZE",
    "recover": "stages.recover.stage:RECOVER",
    "quantize": "stages.quantize.stage:QUANTIZE",
    "export": "stages.export.stage:EXPORT",
    "compile": "stages.compile.stage:COMPILE",
    "items": "stages.items.stage:ITEMS",
    "validate": "stages.validate.stage:VALIDATE",
    "bench": "stages.bench.stage:BENCH",
}


def stage(name: str) -> Stage[Any]:
    """The definition of a stage by its name.

    Raises:
        StageError: no stage is called so.
    """
    if name not in STAGES:
        raise StageError(f"there is no stage {name!r}", limit=", ".join(STAGES))
    module, _, attribute = STAGES[name].partition(":")
    found: Stage[Any] = getattr(import_module(module), attribute)
    return found
