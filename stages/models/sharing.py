"""Which maps of which neighbouring blocks may share a basis, what each rank would lose, and the surgery itself.

Shapes: N windows, T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.allocation import Option
from stages.algorithms.basis import Whitened, cut, fitted, lost, whitened
from stages.models import anatomy
from stages.models.anatomy import Block
from stages.models.shared import SharedLinear
from stages.models.streaming import SITES, Statistics, sensitivities

RANK_STEP = 8
"""Ranks are multiples of this: kernels of every target like inner sizes that 8 divides."""


@dataclass(frozen=True)
class Part:
    """Maps that could stand on one basis.

    Attributes:
        kind: roles joined by `+`, all reading the same input.
        blocks: neighbours.
        system: the stacked maps' singular system.
        moments: E[x x^T] of the input, one a block.
        options: what each rank saves (parameters) and loses (nats a token, to second order).
    """

    kind: str
    blocks: tuple[Block, ...]
    system: Whitened
    moments: tuple[Tensor, ...]
    options: tuple[Option, ...]

    @property
    def roles(self) -> list[str]:
        """The kind's roles."""
        return self.kind.split("+")


def parts(
    model: PreTrainedModel, ids_NT: Tensor, kinds: Sequence[str], group: int, advanced: Callable[[float, float], None]
) -> list[Part]:
    """Every group of `group` neighbouring blocks and every kind, in order of the blocks, measured on `ids_NT`.

    Maps that already stand on a basis or are quantized are left out. Groups are counted from the first block.
    """
    roles = [role for kind in kinds for role in kind.split("+")]
    found: list[Part] = []
    waiting: list[tuple[Block, Statistics]] = []
    for block, statistics in sensitivities(model, ids_NT, roles, advanced):
        waiting.insert(0, (block, statistics))
        if block.index % group == 0:
            if len(waiting) > 1:
                found = [part for kind in kinds if (part := _part(kind, waiting))] + found
            waiting = []
    return found


def _part(kind: str, members: Sequence[tuple[Block, Statistics]]) -> Part | None:
    roles = kind.split("+")
    weights, importance = [], []
    for block, statistics in members:
        maps = anatomy.projections(block)
        for role in roles:
            one = maps[role]
            if not isinstance(one, nn.Linear):
                return None
            weights.append(one.weight.detach())
            importance.append(statistics.gradients[role])
    moments = tuple(statistics.moments[SITES[roles[0]]] for _, statistics in members)
    system = whitened(weights, torch.stack(moments).mean(0), importance)
    damage = lost(system) / 2  # the loss is even around its minimum: half the second derivative times the square
    inputs, outputs = weights[0].shape[1], sum(len(w_OI) for w_OI in weights)
    options = [
        Option(outputs * inputs - rank * (outputs + inputs), float(damage[rank]), rank)
        for rank in range(RANK_STEP, inputs, RANK_STEP)
        if rank * (outputs + inputs) < outputs * inputs
    ]
    return Part(kind, tuple(block for block, _ in members), system, moments, tuple(options))


def share(model: PreTrainedModel, part: Part, option: Option) -> dict[str, Any]:
    """Put the maps of a part on one basis of the option's rank; returns a row for the table."""
    basis_rI = cut(part.system, option.rank)
    basis = _filled(basis_rI, None)
    errors = {}
    for block, moment_II in zip(part.blocks, part.moments, strict=True):
        maps = anatomy.projections(block)
        for role in part.roles:
            old = maps[role]
            assert isinstance(old, nn.Linear)
            coefficient_Or = fitted(old.weight, basis_rI, moment_II)
            path = f"{block.name}.{anatomy.path(role)}"
            errors[path] = _relative_error(old.weight, coefficient_Or @ basis_rI, moment_II)
            model.set_submodule(path, SharedLinear(basis, _filled(coefficient_Or, old.bias)))
    return {
        "blocks": [block.index for block in part.blocks],
        "kind": part.kind,
        "rank": option.rank,
        "parameters_saved": option.saved,
        "predicted_loss_nats": option.damage,
        "output_error_ratio": errors,
    }


def _filled(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.float().contiguous())
    if bias is not None:
        linear.bias = bias
    return linear


def _relative_error(w_OI: Tensor, new_OI: Tensor, moment_II: Tensor) -> float:
    w, moment = w_OI.detach().double(), moment_II.double()
    difference = w - new_OI
    return float(((difference @ moment) * difference).sum() / ((w @ moment) * w).sum())
