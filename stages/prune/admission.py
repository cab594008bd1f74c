"""Whether a checkpoint can lose what is asked, and what shapes it has then, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.models.anatomy import blocks as anatomy
from stages.models.blockwise.run import check_order
from stages.models.checkpoint.editing import matching
from stages.models.checkpoint.subject import Subject, reshape
from stages.models.low_rank.planning import RANK_STEP, dense
from stages.models.text.windows import check_split
from stages.prune import units as surgery
from stages.prune import width, zeros
from stages.prune.channels_heads import plan, said
from stages.prune.gaps import check_depth, check_next_token
from stages.prune.params import WEIGHTS, PruneParams
from stages.prune.target import Asked
from stages.prune.units import CHANNELS, HEADS
from stages.prune.width import READERS, kept_width

ON_A_BASIS = "a map on a basis"
"""Which ones will stand on one is found when they are made; some do."""


def admitted(params: PruneParams, known: Mapping[str, Any]) -> Subject:
    """The pruned checkpoint, as far as shapes say it.

    Raises:
        StageError: as the work would.
    """
    given: Subject = known["model"]
    given.require_float("prune")
    check_split(known, "calibrate")
    if params.method != "magnitude":
        check_order(given.model)
    if params.method in WEIGHTS:
        if given.loose:
            raise zeros.not_dense(ON_A_BASIS)
        if params.method == "gradient":
            check_next_token(given.model)
        names = matching(list(zeros.linears(given.model)), params.layers, params.skip)
        if params.pattern:
            zeros.keepers(given.model, zeros.How(params.method, params.pattern, params.keep, names), {})
        return replace(given, masked=True)
    if params.method == "width":
        anatomy.head(given.model)  # what it predicts says what may go
        if given.loose:
            raise width.not_dense(ON_A_BASIS)
    if params.method == "auto":
        dense(given.model)
        # What goes of what is found when it is priced, so that only what all sizes are multiples of is known.
        return replace(given, loose=gcd(given.loose, RANK_STEP, params.multiple), masked=False)
    limit = int(params.keep * anatomy.block_parameters(given.model))
    asked = Asked(limit, params.multiple, params.by, Path(), uneven=params.widths == "uneven")
    # A copy: other steps read the model as it is.
    cut = replace(given, model=deepcopy(given.model), masked=False)
    if params.method in (CHANNELS, HEADS):
        unit = _narrow(cut, params.method, asked)
    else:
        unit = {"width": _width, "blocks": _blocks}[params.method](cut, asked)
    # How wide bases will be is not known, so that of what is left beside them only the unit is.
    return replace(cut, loose=gcd(given.loose, unit)) if given.loose else cut


# These return what the width that they cut will be a multiple of.


def _narrow(given: Subject, what: str, asked: Asked) -> int:
    made = plan(given.model, what, asked)
    sizes = []
    for block in anatomy.blocks(given.model):
        for units, kept in zip(surgery.of(block, what), made.kept[block.index], strict=True):
            count = _like_any(kept, asked.multiple) if asked.uneven and what == CHANNELS else kept
            weight_OI: Tensor = surgery.reading(block.module.get_submodule(units.reader)).weight  # type: ignore[assignment]
            # The first ones stand for those that the work will choose.
            columns_K = units.columns_GS[:count].flatten()
            surgery.cut(block, units, torch.arange(count), weight_OI.detach()[:, columns_K], made.fields)
            sizes.append(units.columns_GS.shape[1] if what == HEADS else asked.multiple)
    said(given.model, made)
    return gcd(*sizes)


def _like_any(count: int, multiple: int) -> int:
    """A width that is a multiple of no more than any of a block's could be: what divides it divides all of them."""
    times = max(1, count // multiple)
    return multiple * next((one for one in range(times, 1, -1) if all(one % d for d in range(2, one))), 1)


def _width(given: Subject, asked: Asked) -> int:
    kept = kept_width(given.model, asked)
    for block in anatomy.blocks(given.model):
        for role, one in anatomy.projections(block).items():
            reshape(one, **({"inputs": kept} if role in READERS else {"outputs": kept}))
    given.model.config.hidden_size = kept
    return asked.multiple


def _blocks(given: Subject, asked: Asked) -> int:
    check_depth(given.model)
    return 0
