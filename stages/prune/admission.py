"""Whether a checkpoint can lose what is asked, and what shapes it has then, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.editing import matching
from stages.models.checkpoint.subject import Subject, reshape
from stages.prune import units as surgery
from stages.prune import zeros
from stages.prune.channels_heads import plan, said
from stages.prune.gaps import check_depth
from stages.prune.params import WEIGHTS, PruneParams
from stages.prune.target import Asked
from stages.prune.units import CHANNELS, HEADS
from stages.prune.width import READERS, kept_width


def admitted(params: PruneParams, known: Mapping[str, Any]) -> Subject:
    """The pruned checkpoint, as far as shapes say it.

    Raises:
        StageError: as the work would.
    """
    given: Subject = known["model"]
    given.require_float("prune")
    if params.method in WEIGHTS:
        names = matching(list(zeros.linears(given.model)), params.layers, params.skip)
        if params.pattern:
            zeros.keepers(given.model, zeros.How(params.method, params.pattern, params.keep, names), {})
        return replace(given, masked=True)
    if params.method == "width":
        anatomy.head(given.model)  # what it predicts says what may go
    asked = Asked(int(params.keep * anatomy.block_parameters(given.model)), params.multiple, params.by, Path())
    # A copy: other steps read the model as it is.
    cut = replace(given, model=deepcopy(given.model), masked=False)
    if params.method in (CHANNELS, HEADS):
        _narrow(cut, params.method, asked)
    else:
        {"width": _width, "blocks": _blocks}[params.method](cut, asked)
    return cut


def _narrow(given: Subject, what: str, asked: Asked) -> None:
    made = plan(given.model, what, asked)
    for block in anatomy.blocks(given.model):
        for units, count in zip(surgery.of(block, what), made.kept[block.index], strict=True):
            weight_OI: Tensor = surgery.reading(block.module.get_submodule(units.reader)).weight  # type: ignore[assignment]
            # The first ones stand for those that the work will choose.
            columns_K = units.columns_GS[:count].flatten()
            surgery.cut(block, units, torch.arange(count), weight_OI.detach()[:, columns_K], made.fields)
    said(given.model, made)


def _width(given: Subject, asked: Asked) -> None:
    kept = kept_width(given.model, asked)
    for block in anatomy.blocks(given.model):
        for role, one in anatomy.projections(block).items():
            reshape(one, **({"inputs": kept} if role in READERS else {"outputs": kept}))
    given.model.config.hidden_size = kept


def _blocks(given: Subject, asked: Asked) -> None:
    check_depth(given.model)
