"""What of a block can go together, channels of its feed-forward or groups of heads, and the surgery that takes it out.

Shapes: G units, S inputs of the map that reads them that are one unit's, R outputs of a map that writes them that are
one unit's, P units that stay, K their inputs, O outputs of the map that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.attention import Attention, attentions, feed_forward
from stages.models.anatomy.blocks import Block
from stages.models.anatomy.roles import CROSS
from stages.models.layers.low_rank_linear import SharedLinear
from stages.runtime.contract import StageError

CHANNELS, HEADS = "channels", "heads"
_READ_A_KEY = "num_key_value_groups"
_NO_COUNTS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", _READ_A_KEY)
"""Numbers of an attention that stay: a head's width, and how many heads of queries read a key, unless only these go."""


@dataclass(frozen=True)
class Units:
    """Channels of a feed-forward, or groups of heads of one attention.

    Attributes:
        what: CHANNELS or HEADS.
        reader: path inside the block of the map that reads them.
        columns_GS: its inputs, unit by unit.
        writers: path -> outputs of each map that writes them, unit by unit, [G, R].
        owner: path of the module that knows how many there are.
        numbers: a number of it -> how much of that one unit is.
        alone: whether they are heads of queries that all read one key: fewer of them read it then.
    """

    what: str
    reader: str
    columns_GS: Tensor
    writers: Mapping[str, Tensor]
    owner: str
    numbers: Mapping[int, int]
    alone: bool = False

    @property
    def count(self) -> int:
        """G."""
        return len(self.columns_GS)


def of(block: Block, what: str) -> list[Units]:
    """The units of a block: of its feed-forward, or of each of its attentions.

    Raises:
        StageError: the block is not understood.
    """
    where = anatomy.roles(block)
    if what == CHANNELS:
        return [_channels(block, where)]
    return [_heads(one, where, "" if name == "self" else CROSS) for name, one in attentions(block).items()]


def _channels(block: Block, where: Mapping[str, str]) -> Units:
    found = feed_forward(block)
    width = int(found.down.in_features)  # type: ignore[arg-type]
    writers: dict[str, Tensor] = {}
    for role in ("gate", "up", "gate_up"):
        if role in where:
            outputs = int(block.module.get_submodule(where[role]).out_features)  # type: ignore[arg-type]
            if outputs % width:
                raise StageError(
                    f"{block.name}.{where[role]} does not write the channels that are read",
                    measured=f"{outputs} outputs",
                    limit=f"a multiple of {width}",
                )
            writers[where[role]] = torch.arange(outputs).view(-1, width).T
    reader = where["down"]
    return Units(CHANNELS, reader, torch.arange(width)[:, None], writers, reader.rpartition(".")[0], {width: 1})


def _heads(one: Attention, where: Mapping[str, str], prefix: str) -> Units:
    """Groups of key and value with the heads that read them; where there is one such group, its heads of queries."""
    heads, groups, dim = one.heads, one.kv_heads, one.head_dim
    alone = groups == 1 and heads > 1
    count = heads if alone else groups
    each = heads // count
    written: dict[str, list[Tensor]] = {}
    for role in "q" if alone else "qkv":
        path = where[prefix + ("qkv" if "qkv" in one.maps else role)]
        written.setdefault(path, []).append(one.rows(role).reshape(count, -1))
    fused = {(heads + 2 * groups) * dim: (each + (0 if alone else 2)) * dim}
    numbers = fused | ({} if alone else {groups * dim: dim, groups: 1}) | {heads * dim: each * dim, heads: each}
    owner = next(iter(written)).rpartition(".")[0]
    return Units(
        HEADS,
        where[f"{prefix}o"],
        one.rows("o").reshape(count, -1),
        {path: torch.cat(rows, 1) for path, rows in written.items()},
        owner,
        numbers,
        alone,
    )


def check_free(model: PreTrainedModel, what: str) -> None:
    """Raise StageError where a block's units cannot go alone.

    Raises:
        StageError: the map that reads them stands on a basis with other blocks, whose columns are their units too, a
            tensor is tied to another, or a map is no dense one.
    """
    owners: dict[int, str] = {}
    for block in anatomy.blocks(model):
        for units in of(block, what):
            for path in (*units.writers, units.reader):
                one, name = block.module.get_submodule(path), f"{block.name}.{path}"
                own = reading(one) if path == units.reader else writing(one)
                if not isinstance(own, nn.Linear):
                    raise StageError(f"{name} is no dense map", remedy="Prune first, quantize and share afterwards.")
                twin = owners.setdefault(id(own.weight), name)
                if twin != name and path == units.reader and isinstance(one, SharedLinear):
                    role = next(role for role, inner in anatomy.roles(block).items() if inner == path)
                    raise StageError(
                        f"{name} stands on a basis whose inputs are the {what} of several blocks",
                        remedy=f"Leave `{role}` out of share's projections, or prune before sharing it.",
                    )
                if twin != name:
                    raise StageError(
                        f"{name} is tied to {twin}; its {what} cannot go alone", remedy="Prune before tying."
                    )


def reading(one: nn.Module) -> nn.Module:
    """The part of a map that reads its inputs: its basis, where it stands on one."""
    return one.basis if isinstance(one, SharedLinear) else one


def writing(one: nn.Module) -> nn.Module:
    """The part of a map that writes its outputs: its coefficient, where it stands on a basis."""
    return one.coefficient if isinstance(one, SharedLinear) else one


def parameters(block: Block, units: Units) -> int:
    """Parameters of one of the units."""
    count = units.columns_GS.shape[1] * int(
        reading(block.module.get_submodule(units.reader)).out_features  # type: ignore[arg-type]
    )
    for path, rows_GR in units.writers.items():
        own = writing(block.module.get_submodule(path))
        assert isinstance(own, nn.Linear)
        count += rows_GR.shape[1] * (own.in_features + (own.bias is not None))
    return count


def cut(block: Block, units: Units, stay_P: Tensor, reader_OK: Tensor, fields: Mapping[str, int]) -> None:
    """Keep only some units.

    Args:
        block: maps of it lose rows or columns; a shared basis of those that write is not touched.
        units: of this block.
        stay_P: which of them stay, ascending.
        reader_OK: the new weight of the map that reads them, or of its basis.
        fields: of the configuration, for a module that reads there how many units it has.
    """
    goes_G = torch.ones(units.count, dtype=torch.bool).index_fill(0, stay_P, False)
    for path, rows_GR in units.writers.items():
        _drop_outputs(writing(block.module.get_submodule(path)), rows_GR[goes_G].flatten())
    reader = reading(block.module.get_submodule(units.reader))
    assert isinstance(reader, nn.Linear)
    reader.weight = nn.Parameter(reader_OK.to(reader.weight.dtype).contiguous(), requires_grad=False)
    reader.in_features = reader_OK.shape[1]
    owner = block.module.get_submodule(units.owner) if units.owner else block.module
    gone = units.count - len(stay_P)
    for name, value in _counts(owner, units.alone):
        if value in units.numbers:
            setattr(owner, name, value - gone * units.numbers[value])
    configure(owner, fields)


def _counts(owner: nn.Module, alone: bool) -> Iterator[tuple[str, int]]:
    stay = {*_NO_COUNTS, "layer_idx", "layer_id"} - ({_READ_A_KEY} if alone else set())
    for name, value in list(vars(owner).items()):
        if type(value) is int and not name.startswith("_") and name not in stay:
            yield name, value


def configure(owner: nn.Module, fields: Mapping[str, int]) -> None:
    """Give a module a configuration of its own with other numbers: other blocks are not cut yet."""
    config = getattr(owner, "config", None)
    if config is not None and fields:
        own = copy(config)
        for name, value in fields.items():
            setattr(own, name, value)
        owner.config = own


def _drop_outputs(own: nn.Module, rows: Tensor) -> None:
    assert isinstance(own, nn.Linear)
    stays = torch.ones(own.out_features, dtype=torch.bool).index_fill(0, rows, False)
    own.weight = nn.Parameter(own.weight.detach()[stays].contiguous(), requires_grad=False)
    own.out_features = len(own.weight)
    if own.bias is not None:
        own.bias = nn.Parameter(own.bias.detach()[stays].contiguous(), requires_grad=False)
