"""A model that only its own tool can execute, put the same questions as an artifact is by `validate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.measures.items import holds_items
from stages.runtime.contract import Progress
from stages.serving.engine import open_engine
from stages.validate.params import ValidateParams
from stages.validate.questions import questions_of
from stages.validate.text import text_of
from tests.benchmarks.lent import Lent

Ask = Mapping[str, Any]
"""Of one report: `params` of validate, the folder `text`, and whether there is a `baseline`."""


def reports(lent: Lent, dense: Path, asks: Mapping[str, Ask], progress: Progress) -> dict[str, dict[str, Any]]:
    """What `validate` says of an artifact, of a model that was made from `dense`; by the name of each ask.

    Args:
        lent: the model.
        dense: the checkpoint that it was made from: its tokenizer, and the baseline.
        asks: what is measured.
        progress: hears of windows and groups of items.
    """
    theirs = open_engine(dense, verified=True)
    ours, found = replace(theirs, forward=lent.forward, steps=lent.steps), {}
    for name, ask in asks.items():
        params, inputs = ValidateParams.model_validate(ask["params"]), {"model": dense, "text": Path(ask["text"])}
        put = (questions_of if holds_items(inputs["text"]) else text_of)(params, inputs, progress)
        units = []
        for unit in put.scorer(ours, theirs if ask["baseline"] else None)(range(len(put))):
            units.append(unit)
            progress.advanced(len(units), len(put))
        found[name] = put.report(units)
    return found
