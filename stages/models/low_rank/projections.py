"""Which projections `share` can be asked for, and which maps of a block they are.

A map has the role that `anatomy.roles` knows for it; blocks need not have all roles, and fused maps have their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.roles import own_maps, refuse_experts, role_of
from stages.runtime.contract import StageError


def named(block: anatomy.Block) -> dict[str, str]:
    """Role -> path inside the block, for each map whose role is known."""
    found = {role_of(inner): inner for inner in own_maps(block.module)}
    return {role: inner for role, inner in found.items() if role is not None}


def check(model: PreTrainedModel, projections: Sequence[str], *, chosen: bool) -> None:
    """Raise StageError where no block has one of the projections; where nobody chose them, where there is none at all.

    Raises:
        StageError: that, or a block holds experts.
    """
    there: list[str] = []
    for block in anatomy.blocks(model):
        refuse_experts(block.module, block.name)
        there += [role for role in named(block) if role not in there]
    asked = "+".join(projections).split("+")
    missing = [role for role in asked if role not in there]
    if there and not (missing and chosen):
        return
    raise StageError(
        f"{type(model).__name__} has no map for {missing[0]!r} in any block",
        measured=", ".join(there) or "maps whose roles are not known",
        remedy="Leave `projections` out: what is there is taken."
        if there
        else "Use `factorize`, which needs no roles.",
    )
