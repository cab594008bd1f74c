"""A block's attentions and its feed-forward: which maps they are, how many heads, and which rows are whose.

Shapes: h heads of queries, g heads of keys and values, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.models.anatomy.blocks import Block, projections, roles
from stages.models.anatomy.roles import CROSS
from stages.runtime.contract import StageError

_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_INTERLEAVED = ("query_key_value",)
"""Fused maps whose rows go group by group: the heads of queries that read the first k and v, these two, and so on."""


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        maps: role -> map: q, k, v or qkv, and o.
        module: the attention itself, which knows its heads.
        heads: h, of queries.
        kv_heads: g; each is read by h / g heads of queries in a row.
        head_dim: d.
        interleaved: whether a fused map's rows go group by group: heads of queries, then the k and v that they read;
            else all of q, then k, then v.
    """

    maps: dict[str, nn.Module]
    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool = False

    def rows(self, role: str) -> Tensor:
        """Which rows of `q`, `k` or `v`, in the fused map where there is one, belong to each head: int64 [h or g, d].

        For `o`, which of its columns.
        """
        count = self.heads if role in "qo" else self.kv_heads
        if "qkv" not in self.maps or role == "o":
            return torch.arange(count * self.head_dim).view(count, self.head_dim)
        if self.interleaved:
            each = self.heads // self.kv_heads
            rows = torch.arange((self.heads + 2 * self.kv_heads) * self.head_dim)
            of_groups = rows.view(self.kv_heads, each + 2, self.head_dim)
            mine = {"q": of_groups[:, :each], "k": of_groups[:, each:-1], "v": of_groups[:, -1:]}[role]
            return mine.reshape(count, self.head_dim)
        start = {"q": 0, "k": self.heads, "v": self.heads + self.kv_heads}[role] * self.head_dim
        return start + torch.arange(count * self.head_dim).view(count, self.head_dim)


@dataclass(frozen=True)
class FeedForward:
    """down(act(up(x))), or down(act(gate(x)) * up(x)) in a gated one, whose gate and up may be one map, `up`."""

    gate: nn.Module | None
    up: nn.Module
    down: nn.Module


def attentions(block: Block) -> dict[str, Attention]:
    """The block's attentions: `self`, and `cross` where it reads an encoder.

    Raises:
        StageError: the block is not understood, or its heads do not fit its maps.
    """
    found = {"self": _attention(block, "")}
    if CROSS + "q" in roles(block):
        found["cross"] = _attention(block, CROSS)
    return found


def feed_forward(block: Block) -> FeedForward:
    """The block's feed-forward.

    Raises:
        StageError: the block is not understood.
    """
    found = projections(block)
    return FeedForward(found.get("gate"), found.get("gate_up") or found["up"], found["down"])


def _attention(block: Block, prefix: str) -> Attention:
    where, found = roles(block), projections(block)
    maps = {role: found[prefix + role] for role in ("q", "k", "v", "qkv", "o") if prefix + role in found}
    first = next(iter(maps))
    path, _, leaf = where[prefix + first].rpartition(".")
    module = block.module.get_submodule(path)
    width = next((int(getattr(module, name)) for name in _WIDTHS if hasattr(module, name)), 0)
    inputs = int(maps["o"].in_features)  # type: ignore[arg-type]
    if not width or inputs % width:
        raise StageError(f"the heads of {block.name}.{path} are not understood", measured=f"{inputs} inputs of o")
    heads = inputs // width
    if "qkv" in maps:
        rest = int(maps["qkv"].out_features) - inputs  # type: ignore[arg-type]
        kv_heads, even = rest // (2 * width), rest % (2 * width) == 0
    else:
        rest = int(maps["k"].out_features)  # type: ignore[arg-type]
        kv_heads, even = rest // width, rest % width == 0 and int(maps["q"].out_features) == inputs  # type: ignore[arg-type]
    interleaved = leaf in _INTERLEAVED
    if not even or not kv_heads or heads % kv_heads:
        raise StageError(
            f"the heads of {block.name}.{path} are not understood", measured=f"{heads} heads, {rest} rows of k"
        )
    return Attention(maps, module, heads, kv_heads, width, interleaved)
