"""Orthogonal rotations that fold into the weights: the function stays, and what is rounded has no outlying channels.

Shapes: O outputs, I inputs, D coordinates that one rotation mixes, H hidden, d head width, V vocabulary, N rows.

Source: Ashkboos et al. 2024, QuaRot, stages 1a and 1c without what it does on the way; R1 and R2 of Liu et al. 2024,
SpinQuant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.hadamard import rotation
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.attention import attentions
from stages.models.anatomy.blocks import READS_NORM, Block
from stages.models.checkpoint.kept_zeros import is_pruned
from stages.models.layers.low_rank_linear import ResidualLinear, SharedLinear
from stages.models.memory.pages import own
from stages.runtime.contract import StageError

ROWS = 8192
"""Rows rotated at once in double precision."""


@dataclass(frozen=True)
class Use:
    """One tensor that a rotation changes.

    Attributes:
        path: of its module.
        module: a linear map or a table.
        axis: `reads`: its columns face what is rotated; `writes`: its rows and its bias do.
        gain_I: the columns are multiplied by it first.
    """

    path: str
    module: nn.Module
    axis: str
    gain_I: Tensor | None = None


def heads(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Rotate the values of every head of these blocks, between v and o, in place.

    Raises:
        StageError: the architecture is not understood, or a tensor is tied to one that stays.
    """
    r_DD = of_values(model, blocks)
    _apply(model, [use for block in blocks for use in of_heads(block)], r_DD)


def of_values(model: PreTrainedModel, blocks: Sequence[Block]) -> Tensor:
    """r_dd: one for all heads, so that blocks may share tensors."""
    anatomy.check_type(model.config.model_type)
    width, *others = sorted({attentions(block)["self"].head_dim for block in blocks})
    if others:
        raise StageError("the heads differ in width", measured=f"{width}, {others[0]}", limit=1)
    return rotation(width)


def of_heads(block: Block) -> list[Use]:
    """What the rotation of a block's heads changes."""
    maps = anatomy.projections(block)
    return [*_writes(block, "v", maps["v"]), *_reads(block, "o", maps["o"])]


def stream(model: PreTrainedModel) -> None:
    """Rotate the residual stream in place: gains of the norms go into what reads them, a tied table becomes two.

    Raises:
        StageError: the architecture is not understood, or maps that read different norms share a tensor.
    """
    anatomy.check_type(model.config.model_type)
    table, head, gains = anatomy.embedding(model), anatomy.head(model), [anatomy.last_norm(model)]
    uses = [Use("the embedding", table, "reads"), Use("the head", head, "reads", _gain(gains[0]))]
    for block in anatomy.blocks(model):
        maps, norms = anatomy.projections(block), anatomy.norms(block)
        for norm, roles in READS_NORM.items():
            gain_I = _gain(norms[norm])
            uses += [use for role in roles for use in _reads(block, role, maps[role], gain_I)]
            gains.append(norms[norm])
        uses += [use for role in ("o", "down") for use in _writes(block, role, maps[role])]
    if head.weight is table.weight and uses[1].gain_I is not None:
        head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        model.config.tie_word_embeddings = False
    _apply(model, uses, rotation(int(table.weight.shape[1])))  # type: ignore[index]
    with torch.no_grad():
        for one in gains:
            one.weight.fill_(1.0)  # type: ignore[operator]


def _gain(norm: nn.Module) -> Tensor | None:
    """A copy, since the norm's own becomes one; None where it is one already."""
    gain_I = norm.get_parameter("weight").detach().clone()
    return None if bool((gain_I == 1).all()) else gain_I


def _reads(block: Block, role: str, found: nn.Module, gain_I: Tensor | None = None) -> Iterator[Use]:
    for path, one in _ends(f"{block.name}.{anatomy.path(role)}", found, "basis"):
        yield Use(path, one, "reads", gain_I)


def _writes(block: Block, role: str, found: nn.Module) -> Iterator[Use]:
    for path, one in _ends(f"{block.name}.{anatomy.path(role)}", found, "coefficient"):
        yield Use(path, one, "writes")


def _ends(path: str, module: nn.Module, end: str) -> Iterator[tuple[str, nn.Module]]:
    """The dense maps with which a map reads (`basis`) or writes (`coefficient`)."""
    if isinstance(module, ResidualLinear):
        yield from _ends(f"{path}.dense", module.dense, end)
        yield from _ends(f"{path}.low", module.low, end)
    elif isinstance(module, SharedLinear):
        yield from _ends(f"{path}.{end}", module.get_submodule(end), end)
    elif isinstance(module, nn.Linear):
        yield path, module
    else:
        raise StageError(f"{path} is no dense map", measured=type(module).__name__, remedy="Rotate before quantizing.")


def _check(model: PreTrainedModel, uses: Sequence[Use]) -> None:
    """Raise StageError where a tensor has zeros to keep, two ways to be turned, or a place that no rotation knows."""
    known: dict[int, Use] = {}
    for use in uses:
        first = known.setdefault(id(use.module.weight), use)
        alike = first.gain_I is use.gain_I or (
            first.gain_I is not None and use.gain_I is not None and torch.equal(first.gain_I, use.gain_I)
        )
        if first.axis != use.axis or not alike:
            raise _tied(first.path, use.path)
        if is_pruned(use.module.get_parameter("weight")):
            raise StageError(
                f"{use.path} has zeros that a rotation would fill",
                limit="no map from which single weights were pruned",
                remedy="Set `rotation: off`.",
            )
    places, changed = {id(use.module) for use in uses}, {id(tensor): use for use in uses for tensor in _changed(use)}
    for path, module in model.named_modules():
        for tensor in module._parameters.values():
            if id(tensor) in changed and id(module) not in places:
                raise _tied(changed[id(tensor)].path, path)


def _changed(use: Use) -> list[Tensor]:
    """The weight, and the bias of a map that writes."""
    bias = getattr(use.module, "bias", None)
    return [use.module.get_parameter("weight"), *([bias] if use.axis == "writes" and bias is not None else [])]


def _tied(one: str, other: str) -> StageError:
    return StageError(
        f"{one} shares a tensor with {other}, which this rotation would turn in another way",
        remedy="Set `rotation` to `heads` where the norms' gains differ, or to `off`; or rotate before sharing.",
    )


def _apply(model: PreTrainedModel, uses: Sequence[Use], r_DD: Tensor) -> None:
    _check(model, uses)
    seen: set[int] = set()
    with torch.no_grad():
        for use in uses:
            for tensor in _changed(use):
                if id(tensor) not in seen:  # in place and once, so that what is tied stays so
                    own(tensor)
                    facing = tensor if use.axis == "reads" else tensor.view(len(tensor), -1).T
                    turn(facing, r_DD, use.gain_I)
                seen.add(id(tensor))


def turn(x_NI: Tensor, r_DD: Tensor, gain_I: Tensor | None = None) -> None:
    """Rotate the columns in place, D by D."""
    for part_NI in x_NI.split(ROWS):
        wide_NI = part_NI.double() if gain_I is None else part_NI.double() * gain_I.double()
        part_NI.copy_((wide_NI.unflatten(1, (-1, len(r_DD))) @ r_DD).flatten(1))
