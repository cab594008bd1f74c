"""Which maps may stand on a basis, alone or with others, what each rank would lose, and which to take for a target.

Shapes: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms import basis, low_rank
from stages.algorithms.allocation import Option, allocate
from stages.algorithms.grouping import Span, grouped, most
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.run import SITES, sensitivities
from stages.models.memory.spill import Shelf

RANK_STEP = 8
"""Ranks are multiples of this: kernels of every target like inner sizes that 8 divides."""
Ways = dict[Span, list[tuple["Part", ...]]]


@dataclass(frozen=True)
class Part:
    """Maps that could stand on one basis: one map alone, or several with the same input, of one block or neighbours.

    Attributes:
        roles: of each block.
        blocks: neighbours.
        options: what each rank saves (parameters) and loses (nats a token, to second order).
    """

    roles: tuple[str, ...]
    blocks: tuple[Block, ...]
    options: tuple[Option, ...]

    @property
    def paths(self) -> list[str]:
        """Where its maps stand."""
        return [f"{block.name}.{anatomy.path(role)}" for block in self.blocks for role in self.roles]


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


class Measured:
    """What one pass over the calibration windows says of every way to cut the maps."""

    def __init__(
        self, model: PreTrainedModel, kinds: Sequence[str], group: int, names: Collection[str] | None = None
    ) -> None:
        self._model, self._kinds, self._group = model, [tuple(kind.split("+")) for kind in kinds], group
        self._names = frozenset(dense(model) if names is None else names)
        self._gradients: dict[int, Mapping[str, Tensor]] = {}
        self._ways: dict[tuple[str, ...], Ways] = {kind: {} for kind in self._kinds}

    def measure(self, ids_NT: Tensor, folder: Path, advanced: Callable[[float, float], None]) -> None:
        """Take the statistics of every block and price every part, from the last block to the first.

        Moments wait in `folder`.

        Raises:
            StageError: an activation is not finite.
        """
        blocks, self._moments = anatomy.blocks(self._model), Shelf(folder)
        roles = [role for kind in self._kinds for role in kind]
        for block, statistics in sensitivities(self._model, ids_NT, roles, folder, advanced):
            self._gradients[block.index] = statistics.gradients
            self._moments.put(block.index, statistics.moments)
            for kind, ways in self._ways.items():
                alone = tuple(self._part((role,), (block,)) for role in kind)
                ways[block.index, block.index + 1] = [alone]
                for size in range(1 if len(kind) > 1 else 2, self._group + 1):
                    members = tuple(blocks[block.index : block.index + size])
                    if len(members) == size and self._free(kind, members):
                        span = (block.index, block.index + size)
                        ways.setdefault(span, []).append((self._part(kind, members),))

    @property
    def most(self) -> int:
        """What all parts could save together."""
        return most(self._priced(self._ways.values()))

    def plan(self, saved: int) -> dict[str, Plan]:
        """Path -> plan of the maps to change, so that at least `saved` parameters go at the least expected loss.

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
        plans: dict[str, Plan] = {}
        for part, option in chosen:
            shared = self._basis(part, option.rank) if len(part.paths) > 1 else None
            importance = [self._gradients[block.index][role] for block in part.blocks for role in part.roles]
            for path, one in zip(part.paths, importance, strict=True):
                plans[path] = Plan(part, option, one, shared)
        return plans

    def _priced(self, chains: Iterable[Ways]) -> list[tuple[int, dict[Span, list[list[tuple[Option, ...]]]]]]:
        count = len(self._gradients)
        return [
            (count, {span: [[part.options for part in way] for way in found] for span, found in ways.items()})
            for ways in chains
        ]

    def _allocated(self, chains: Sequence[Ways], saved: int) -> list[tuple[Part, Option]]:
        cuts = grouped(self._priced(chains), saved)
        parts = [part for ways, cut in zip(chains, cuts, strict=True) for span, way in cut for part in ways[span][way]]
        options = allocate([part.options for part in parts], saved)
        return [(part, option) for part, option in zip(parts, options, strict=True) if option.rank]

    def _free(self, roles: Sequence[str], blocks: Sequence[Block]) -> bool:
        return all(f"{block.name}.{anatomy.path(role)}" in self._names for block in blocks for role in roles)

    def _stack(self, roles: Sequence[str], blocks: Sequence[Block]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Weights, outputs' importance and the pooled moment of the inputs."""
        maps = [anatomy.projections(block)[role] for block in blocks for role in roles]
        importance = [self._gradients[block.index][role] for block in blocks for role in roles]
        moment_II = torch.stack([self._moments.get(block.index, SITES[roles[0]]) for block in blocks]).mean(0)
        return [one.weight.detach() for one in maps], importance, moment_II  # type: ignore[operator]

    def _part(self, roles: tuple[str, ...], blocks: tuple[Block, ...]) -> Part:
        if not self._free(roles, blocks):
            return Part(roles, blocks, ())
        weights, importance, moment_II = self._stack(roles, blocks)
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
            roles,
            blocks,
            tuple(Option(outputs * inputs - r * (outputs + inputs), float(damage[r]), r) for r in ranks),
        )

    def _basis(self, part: Part, rank: int) -> nn.Linear:
        weights, importance, moment_II = self._stack(part.roles, part.blocks)
        return filled(basis.cut(basis.whitened(weights, moment_II, importance), rank), None)


def dense(model: PreTrainedModel) -> list[str]:
    """Paths of the blocks' maps that stand on no basis yet."""
    return [
        f"{block.name}.{anatomy.path(role)}"
        for block in anatomy.blocks(model)
        for role, one in anatomy.projections(block).items()
        if isinstance(one, nn.Linear)
    ]


def filled(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A linear map of these weights, float32."""
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.float().contiguous())
    if bias is not None:
        linear.bias = bias
    return linear
