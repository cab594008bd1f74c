"""Whether a checkpoint can lose what is asked, and what shapes it has then, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.models.anatomy import blocks as anatomy
from stages.models.checkpoint.editing import matching
from stages.models.checkpoint.subject import Subject, reshape
from stages.prune import zeros
from stages.prune.channels_heads import Asked, check_depth, kept_channels, kept_heads
from stages.prune.params import WEIGHTS, PruneParams
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
    _CUTS[params.method](cut, asked)
    return cut


def _channels(given: Subject, asked: Asked) -> None:
    kept = kept_channels(given.model, asked)
    for block in anatomy.blocks(given.model):
        found = anatomy.projections(block)
        for role in ("gate", "up"):
            reshape(found[role], outputs=kept)
        reshape(found["down"], inputs=kept)
    given.model.config.intermediate_size = kept


def _heads(given: Subject, asked: Asked) -> None:
    kept, readers, dim = kept_heads(given.model, asked)
    for block in anatomy.blocks(given.model):
        found = anatomy.projections(block)
        reshape(found["q"], outputs=kept * readers * dim)
        reshape(found["o"], inputs=kept * readers * dim)
        for role in ("k", "v"):
            reshape(found[role], outputs=kept * dim)
    config = given.model.config
    config.num_key_value_heads, config.num_attention_heads, config.head_dim = kept, kept * readers, dim


def _width(given: Subject, asked: Asked) -> None:
    kept = kept_width(given.model, asked)
    for block in anatomy.blocks(given.model):
        for role, one in anatomy.projections(block).items():
            reshape(one, **({"inputs": kept} if role in READERS else {"outputs": kept}))
    given.model.config.hidden_size = kept


def _blocks(given: Subject, asked: Asked) -> None:
    check_depth(given.model)


_CUTS = {"channels": _channels, "heads": _heads, "width": _width, "blocks": _blocks}
