"""Which maps may stand on a basis, alone or with others, what each rank would lose, and which to take for a target.

Shapes: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms import basis, low_rank
from stages.algorithms.allocation import Option, allocate
from stages.algorithms.grouping import Span, grouped, most
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block, linear_maps
from stages.models.anatomy.roles import refuse_experts
from stages.models.blockwise.map_statistics import BySource, MapStatistics, statistics_of
from stages.models.blockwise.sites import float_maps
from stages.models.low_rank.projections import named
from stages.models.memory.spill import Shelf

_WHOLE = BySource()
RANK_STEP = 8
"""Ranks are multiples of this: kernels of every target like inner sizes that 8 divides."""
BESIDE = "beside"
"""Begins the kind of parts that go in another way: a map that they name may stand on a basis, too."""
Kinds = Sequence[tuple[str, ...]]
"""Roles that may share a basis."""
Ways = dict[Span, list[tuple["Part", ...]]]


@dataclass(frozen=True)
class Part:
    """Maps that could stand on one basis: one map alone, or several with the same input, of one block or neighbours.

    Attributes:
        maps: of each block, by their paths in it.
        blocks: neighbours.
        options: what each rank saves (parameters) and loses (nats a token, to second order).
    """

    maps: tuple[str, ...]
    blocks: tuple[Block, ...]
    options: tuple[Option, ...]

    @property
    def paths(self) -> list[str]:
        """Where its maps stand."""
        return [f"{block.name}.{inner}" for block in self.blocks for inner in self.maps]


@dataclass(frozen=True)
class Plan:
    """What is to be done to a map.

    Attributes:
        part: that it belongs to.
        option: the rank, what it saves and what it is expected to lose.
        importance_O: weight of each output's squared error.
        basis: module shared by the part's maps; None for a map alone, whose basis is found when its turn comes.
    """

    part: Part
    option: Option
    importance_O: Tensor
    basis: nn.Linear | None


def _nothing(_block: Block, _statistics: MapStatistics) -> tuple[Part, ...]:
    return ()


class Measured:
    """What one pass over the calibration windows says of every way to cut the maps."""

    def __init__(
        self, model: PreTrainedModel, kinds: Kinds | None, group: int, names: Collection[str], floor: float = 0.0
    ) -> None:
        """Ask what may go.

        Args:
            model: whose maps they are.
            kinds: roles that may share a basis; None for every map by itself.
            group: most neighbours on one basis.
            names: paths of the maps that may change.
            floor: share of the inputs' median energy that every direction of them is priced to carry besides its own.
        """
        self._model, self._kinds, self._group, self._names = model, kinds, group, frozenset(names)
        self._floor = floor
        self._statistics: dict[int, MapStatistics] = {}
        self._ways: dict[tuple[str, ...], Ways] = {}
        self.idle: list[str] = []

    def measure(
        self,
        ids_NT: Tensor,
        folder: Path,
        advanced: Callable[[float, float], None],
        beside: Callable[[Block, MapStatistics], Iterable[Part]] = _nothing,
        by_source: BySource = _WHOLE,
    ) -> None:
        """Take the statistics of every block and price every part, from the last block to the first.

        Moments wait in `folder`; what was asked and does not run is `idle` then.

        Args:
            ids_NT: calibration windows.
            folder: for state.
            advanced: told (done, total).
            beside: of a block and its statistics the parts that could go in another way, each priced.
            by_source: what those want of each source of the text by its own.

        Raises:
            StageError: an activation is not finite.
        """
        blocks, self._moments = anatomy.blocks(self._model), Shelf(folder)
        for block, statistics in statistics_of(self._model, ids_NT, folder, advanced, by_source):
            for part in beside(block, statistics):
                ways = self._ways.setdefault((BESIDE, *part.maps), {})
                ways[block.index, block.index + 1] = [(part,)]
            self._moments.put(block.index, statistics.moments)
            statistics.moments, statistics.sources = {}, {}
            self._statistics[block.index] = statistics
            self.idle += [
                path
                for inner in float_maps(block)
                if (path := f"{block.name}.{inner}") in self._names and inner not in statistics.first
            ]
            for kind in self._asked(block, statistics):
                ways = self._ways.setdefault(kind, {})
                ways[block.index, block.index + 1] = [tuple(self._part((inner,), (block,)) for inner in kind)]
                for size in range(1 if len(kind) > 1 else 2, self._group + 1):
                    members = tuple(blocks[block.index : block.index + size])
                    if len(members) == size and self._free(kind, members):
                        span = (block.index, block.index + size)
                        ways[span] = [*ways.get(span, []), (self._part(kind, members),)]

    def _asked(self, block: Block, statistics: MapStatistics) -> list[tuple[str, ...]]:
        """Of a block, the maps that may go together, by their paths in it."""
        if self._kinds is None:
            return [(inner,) for inner in statistics.first]
        found = [
            tuple(where[role] for role in kind if role in where) for kind in self._kinds for where in [named(block)]
        ]
        return [kind for kind in found if kind and all(inner in statistics.first for inner in kind)]

    @property
    def most(self) -> int:
        """What all parts could save together."""
        return most(self._priced(self._ways.values()))

    def chosen(self, saved: int) -> list[tuple[Part, Option]]:
        """What goes, so that it is at least `saved` parameters at the least expected loss.

        Raises:
            ValueError: so much cannot be saved.
        """
        chosen = self._allocated(list(self._ways.values()), saved)
        alone = [
            {span: found[:1] for span, found in ways.items() if span[1] - span[0] == 1} for ways in self._ways.values()
        ]
        # The price at which groups are cut leaves a gap to the target; a plan without any group may fill it better.
        if most(self._priced(alone)) >= saved:
            chosen = min(chosen, self._allocated(alone, saved), key=lambda pairs: sum(one.damage for _, one in pairs))
        return chosen

    def plan(self, chosen: Iterable[tuple[Part, Option]]) -> dict[str, Plan]:
        """Path -> plan of the maps that go on bases."""
        plans: dict[str, Plan] = {}
        for part, option in chosen:
            shared = self._basis(part, option.rank) if len(part.paths) > 1 else None
            importance = [self._statistics[block.index].gradients[one] for block in part.blocks for one in part.maps]
            for path, one in zip(part.paths, importance, strict=True):
                plans[path] = Plan(part, option, one, shared)
        return plans

    def _priced(self, chains: Iterable[Ways]) -> list[tuple[int, dict[Span, list[list[tuple[Option, ...]]]]]]:
        priced = []
        for ways in chains:
            # Blocks that have not these maps are there, too: nothing is done to them.
            spans = dict[Span, list[list[tuple[Option, ...]]]]({(i, i + 1): [[]] for i in range(len(self._statistics))})
            for span, found in ways.items():
                spans[span] = [[part.options for part in way] for way in found]
            priced.append((len(self._statistics), spans))
        return priced

    def _allocated(self, chains: Sequence[Ways], saved: int) -> list[tuple[Part, Option]]:
        cuts = grouped(self._priced(chains), saved)
        parts = [
            part
            for ways, cut in zip(chains, cuts, strict=True)
            for span, way in cut
            if span in ways
            for part in ways[span][way]
        ]
        options = allocate([part.options for part in parts], saved)
        return [(part, option) for part, option in zip(parts, options, strict=True) if option.rank]

    def _free(self, maps: Sequence[str], blocks: Sequence[Block]) -> bool:
        """Whether they may go, and can stand on one basis: of one stack, running, of one shape in every block."""
        there = all(f"{block.name}.{one}" in self._names for block in blocks for one in maps)
        if not there or not all(one in self._statistics[block.index].first for block in blocks for one in maps):
            return False
        shapes = {tuple(block.module.get_submodule(one).weight.shape for one in maps) for block in blocks}
        return (
            len({block.stack for block in blocks}) == len({type(block.module) for block in blocks}) == len(shapes) == 1
        )

    def _stack(self, maps: Sequence[str], blocks: Sequence[Block]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Weights, outputs' importance and the pooled moment of the inputs."""
        weights = [block.module.get_submodule(one).weight.detach() for block in blocks for one in maps]  # type: ignore[operator]
        found = [self._statistics[block.index] for block in blocks]
        importance = [one.gradients[path] for one in found for path in maps]
        places = [(block.index, one.first[maps[0]]) for block, one in zip(blocks, found, strict=True)]
        return weights, importance, torch.stack([self._moments.get(*place) for place in places]).mean(0)

    def _part(self, maps: tuple[str, ...], blocks: tuple[Block, ...]) -> Part:
        if not self._free(maps, blocks):
            return Part(maps, blocks, ())
        weights, importance, moment_II = self._stack(maps, blocks)
        moment_II.diagonal().add_(self._floor * moment_II.diagonal().median())
        if len(weights) > 1:
            damage = basis.lost(weights, moment_II, importance) / 2
        else:
            damage = low_rank.lost(weights[0], moment_II, importance[0]) / 2
        inputs, outputs = weights[0].shape[1], sum(len(w_OI) for w_OI in weights)
        # The loss is even around its minimum: half the second derivative times the square.
        ranks = [
            rank for rank in range(RANK_STEP, len(damage), RANK_STEP) if rank * (outputs + inputs) < outputs * inputs
        ]
        return Part(
            maps,
            blocks,
            tuple(Option(outputs * inputs - r * (outputs + inputs), float(damage[r]), r) for r in ranks),
        )

    def _basis(self, part: Part, rank: int) -> nn.Linear:
        weights, importance, moment_II = self._stack(part.maps, part.blocks)
        return filled(basis.cut(basis.whitened(weights, moment_II, importance), rank), None)


def dense(model: PreTrainedModel) -> list[str]:
    """Paths of the blocks' maps that stand on no basis yet.

    Raises:
        StageError: a block holds experts, which are most of it and none of its maps.
    """
    found = []
    for block in anatomy.blocks(model):
        refuse_experts(block.module, block.name)
        found += [f"{block.name}.{inner}" for inner, one in linear_maps(block).items() if isinstance(one, nn.Linear)]
    return found


def filled(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A linear map of these weights, float32."""
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.float().contiguous())
    if bias is not None:
        linear.bias = bias
    return linear
