"""Channels, groups of heads and ranks of maps by one budget: what goes is whatever costs the text least.

All three are priced by one pass in one currency, nats a token to second order: squared errors of outputs by the
curvature of the loss. Units go first; then maps are put on bases of low rank until the target is met.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from stages.algorithms.allocation import Option
from stages.algorithms.channels import FLOOR
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.plainness import plain
from stages.models.blockwise.compress import compress
from stages.models.blockwise.map_statistics import MapStatistics
from stages.models.low_rank import products
from stages.models.low_rank.kinds import TOGETHER
from stages.models.low_rank.planning import Measured, Part, dense
from stages.models.low_rank.projections import named
from stages.prune import units as surgery
from stages.prune.channels_heads import Plan, narrowing, priced, wanted
from stages.prune.cut_proof import proven
from stages.prune.target import Asked, Rows, cannot
from stages.prune.units import CHANNELS, HEADS, Units
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass

_WHAT = "channels, heads and ranks"
_PASSES = 4
"""Prices, channels, heads, ranks."""


@dataclass(frozen=True)
class UnitsPart(Part):
    """Units of a block that could go.

    Attributes:
        units: which; an option's `rank` is how many of them.
        importance_O: weight of each squared error at the outputs of the map that reads them.
    """

    units: Units
    importance_O: Tensor


def automatic(model: PreTrainedModel, ids_NT: Tensor, asked: Asked, progress: Progress) -> Rows:
    """Take out channels, heads and ranks, each where it costs least.

    Args:
        model: is changed.
        ids_NT: calibration windows.
        asked: parameters that may stay, and what numbers of channels are multiples of.
        progress: told of the passes, and of what goes.

    Returns:
        A row a map that changed.

    Raises:
        StageError: so much cannot go, or an activation is not finite.
    """
    total, free = anatomy.block_parameters(model), takeable(model, asked, progress)
    kinds = [tuple(kind.split("+")) for kind in _kinds(model) or ()] or None
    names = [name for name in dense(model) if plain(model.get_submodule(name))]
    # Units are priced with this floor: without it a rank would seem to cost less than it does beside them.
    measured = Measured(model, kinds, 1, names, FLOOR)
    measured.measure(
        ids_NT,
        asked.partial / "statistics",
        Pass(progress, 0, _PASSES).advanced,
        lambda block, seen: _parts(block, seen, free, asked.multiple),
        wanted(asked, *free),
    )
    if measured.most < total - asked.limit:
        raise cannot(_WHAT, total - measured.most, total, asked)
    chosen = measured.chosen(total - asked.limit)
    progress.note(_told(chosen, total))
    ranks = asked.partial / "ranks"
    plans = [plan for what in free if (plan := _plan(model, what, chosen))]
    if not plans:
        how = products.LowRank(measured.plan(chosen))
        del measured
        return products.fitted(model, ids_NT, how, ranks, Pass(progress, 3, _PASSES)).rows
    del measured  # its moments are the larger part of what is held
    rows: Rows = []
    for place, plan in enumerate(plans, start=1):
        state, heard = asked.partial / plan.what, Pass(progress, place, _PASSES)
        rows += compress(model, ids_NT, narrowing(plan, asked), state, heard)
    left = anatomy.block_parameters(model)
    if left > asked.limit:
        # Of a narrowed block other numbers of parameters go with a rank: they are priced again, on what stands now.
        more = products.Asked(asked.limit / left, _kinds(model))
        try:
            rows += products.compressed(model, ids_NT, more, ranks, Pass(progress, 3, _PASSES)).rows
        except products.TooMuch as error:
            raise cannot(_WHAT, error.best, total, asked) from error
    else:
        progress.advanced(1, 1)
    return rows


def takeable(model: PreTrainedModel, asked: Asked, progress: Progress | None = None) -> list[str]:
    """CHANNELS and HEADS, as far as they can go alone; of what cannot, the reason is noted."""
    found = []
    for what in (CHANNELS, HEADS):
        try:
            surgery.check_free(model, what)
            step = asked.multiple if what == CHANNELS else 1
            every = [[one.count for one in surgery.of(block, what)] for block in anatomy.blocks(model)]
            proven(model, what, [[max(count - step, min(step, count)) for count in one] for one in every], said=False)
        except StageError as error:
            if progress:
                progress.note(f"{what} stay: {error}")
        else:
            found.append(what)
    return found


def _kinds(model: PreTrainedModel) -> Sequence[str] | None:
    """What may stand on one basis; None where the roles of the maps are not known."""
    return TOGETHER if any(named(block) for block in anatomy.blocks(model)) else None


def _parts(block: Block, seen: MapStatistics, free: Sequence[str], multiple: int) -> Iterator[UnitsPart]:
    for what in free:
        for units in surgery.of(block, what):
            options, importance_O = priced(block, units, seen, multiple if what == CHANNELS else 1)
            yield UnitsPart((units.reader,), (block,), tuple(options), units, importance_O)


def _plan(model: PreTrainedModel, what: str, chosen: Sequence[tuple[Part, Option]]) -> Plan | None:
    """What stays of every block; None where all of it does."""
    parts = [(part, option) for part, option in chosen if isinstance(part, UnitsPart) and part.units.what == what]
    if not parts:
        return None
    gone = {part.paths[0]: option.rank for part, option in parts}
    kept = [
        [units.count - gone.get(f"{block.name}.{units.reader}", 0) for units in surgery.of(block, what)]
        for block in anatomy.blocks(model)
    ]
    return Plan(what, kept, {}, {part.paths[0]: part.importance_O for part, _ in parts})


def _told(chosen: Sequence[tuple[Part, Option]], total: int) -> str:
    """What goes of which kind."""
    saved = {CHANNELS: 0, HEADS: 0, "ranks": 0}
    for part, option in chosen:
        saved[part.units.what if isinstance(part, UnitsPart) else "ranks"] += option.saved
    shares = ", ".join(f"{share / total:.2%} as {what}" for what, share in saved.items() if share)
    return f"of the blocks' parameters go {shares}, at {sum(one.damage for _, one in chosen):.3g} nats a token"
