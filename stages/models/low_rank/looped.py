"""Neighbouring blocks on the same weights, each with a difference of low rank of its own.

Shapes: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms import low_rank
from stages.algorithms.allocation import Option, allocate
from stages.algorithms.recursive import common
from stages.algorithms.refit import output_errors
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.plainness import plain
from stages.models.anatomy.roles import refuse_experts
from stages.models.blockwise.block_calls import stacks
from stages.models.blockwise.compress import compress
from stages.models.blockwise.map_statistics import MapStatistics, statistics_of
from stages.models.blockwise.site_moments import Seen
from stages.models.blockwise.technique import Compressed, OnWeights
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.low_rank.planning import RANK_STEP, filled
from stages.models.low_rank.products import Done
from stages.runtime.contract import Progress, StageError
from stages.runtime.progress import Pass


@dataclass(frozen=True)
class Loop:
    """Maps of one path in neighbouring blocks that could have the same weights.

    Attributes:
        paths: where they stand.
        weight: what they share; not yet the model's.
        importance: for each map the weight of each output's squared error.
        options: what each rank of the differences saves (parameters) and loses (nats a token, to second order).
    """

    paths: tuple[str, ...]
    weight: nn.Parameter
    importance: tuple[Tensor, ...]
    options: tuple[Option, ...]


def looped(model: PreTrainedModel, ids_NT: Tensor, group: int, keep: float, partial: Path, progress: Progress) -> Done:
    """Give groups of `group` neighbours the same weights until at most `keep` of the blocks' parameters are left.

    Ranks of the differences are chosen by the measured loss; the differences are fitted to what the dense model gives.

    Raises:
        StageError: so much cannot be saved, or an activation is not finite.
    """
    loops = _loops(model, ids_NT, group, partial, progress)
    total = anatomy.block_parameters(model)
    wanted = total - int(keep * total)
    best = sum(max((option.saved for option in loop.options), default=0) for loop in loops)
    if best < wanted:
        raise StageError(
            f"the same weights in groups of {group} blocks cannot save so much",
            measured=f"keep {1 - best / total:.4f} at best",
            limit=f"keep {keep}",
            remedy="Raise `keep`, or allow larger groups.",
        )
    chosen = allocate([loop.options for loop in loops], wanted)
    taken = [(loop, option) for loop, option in zip(loops, chosen, strict=True) if option.rank]
    places = {
        path: (loop, option, one)
        for loop, option in taken
        for path, one in zip(loop.paths, loop.importance, strict=True)
    }
    technique = OnWeights(Recursive(places), idle=True)
    rows = compress(
        model,
        ids_NT,
        technique,
        partial,
        Pass(progress, 1, 2),
    )
    return Done(rows, sum(option.damage for _, option in taken))


def check(model: PreTrainedModel) -> None:
    """Raise StageError where no block has a neighbour to share weights with, or blocks hold experts."""
    for block in anatomy.blocks(model):
        refuse_experts(block.module, block.name)
    if max(len(stack) for stack in anatomy.stacks(model).values()) < 2:
        raise StageError(
            f"{type(model).__name__} has no neighbouring blocks",
            measured="1 block",
            limit="at least 2",
            remedy="Use `method: basis`, or `factorize`.",
        )


def _loops(model: PreTrainedModel, ids_NT: Tensor, group: int, folder: Path, progress: Progress) -> list[Loop]:
    """Every group of neighbours and every map, in order of the blocks; groups are counted from a stack's first."""
    loops: list[Loop] = []
    waiting: list[tuple[Block, MapStatistics]] = []
    firsts = {stack.blocks[0].index for stack in stacks(model)}
    for block, statistics in statistics_of(model, ids_NT, folder, Pass(progress, 0, 2).advanced):
        waiting.insert(0, (block, statistics))
        first = max(index for index in firsts if index <= block.index)
        if (block.index - first) % group == 0:
            paths = [path for path in statistics.first if all(path in other.first for _, other in waiting)]
            if len(waiting) > 1:
                loops = [loop for path in paths if (loop := _loop(path, waiting))] + loops
            waiting = []
    return loops


def _loop(path: str, members: Sequence[tuple[Block, MapStatistics]]) -> Loop | None:
    maps = [block.module.get_submodule(path) for block, _ in members]
    weights = [one.weight.detach() for one in maps if isinstance(one, nn.Linear) and plain(one)]
    if len(weights) < len(members) or len({w_OI.shape for w_OI in weights}) > 1:
        return None
    moments = [statistics.moments[statistics.first[path]] for _, statistics in members]
    importance = tuple(statistics.gradients[path] for _, statistics in members)
    shared_OI = common(weights, moments, importance)
    damage = torch.stack(
        [low_rank.lost(w - shared_OI, m, g) / 2 for w, m, g in zip(weights, moments, importance, strict=True)]
    ).sum(0)
    outputs, inputs = shared_OI.shape
    saved = [
        (len(weights) - 1) * outputs * inputs - len(weights) * rank * (outputs + inputs) for rank in range(len(damage))
    ]
    options = tuple(
        Option(saved[rank], float(damage[rank]), rank)
        for rank in range(RANK_STEP, len(damage), RANK_STEP)
        if saved[rank] > 0
    )
    paths = tuple(f"{block.name}.{path}" for block, _ in members)
    return Loop(paths, nn.Parameter(shared_OI.float(), requires_grad=False), importance, options)


@dataclass(frozen=True)
class Recursive:
    """By path: the loop it belongs to, the option taken, the importance of its outputs."""

    places: Mapping[str, tuple[Loop, Option, Tensor]]

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> dict[str, Compressed]:
        """See Technique: what the map should be now less what the loop shares, cut to the rank."""
        made = {}
        for inner, linear in maps.items():
            path = f"{block.name}.{inner}"
            if path in self.places:
                loop, option, importance_O = self.places[path]
                target_OI = seen.target(inner, linear.weight.detach())
                difference_OI = target_OI - loop.weight
                left_Or, right_rI = low_rank.cut(
                    low_rank.factors(difference_OI, seen.moment_II, importance_O), option.rank
                )
                made_OI = [loop.weight, loop.weight + left_Or @ right_rI]
                shared, error = output_errors(target_OI, made_OI, seen.moment_II)
                row = {
                    "rank": option.rank,
                    "shares_with": [other for other in loop.paths if other != path],
                    "predicted_loss_nats": option.damage / len(loop.paths),
                    "output_error_ratio_shared": shared,
                    "output_error_ratio": error,
                }
                made[inner] = Compressed({"left": left_Or.float().contiguous(), "right": right_rI.float()}, row)
        return made

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique."""
        old = model.get_submodule(path)
        old = old.dense if isinstance(old, ResidualLinear) else old
        assert isinstance(old, nn.Linear)
        dense = nn.utils.skip_init(nn.Linear, old.in_features, old.out_features, bias=old.bias is not None)
        dense.weight, dense.bias = self.places[path][0].weight, old.bias
        low = SharedLinear(filled(tensors["right"], None), filled(tensors["left"], None))
        model.set_submodule(path, ResidualLinear(dense, low))
