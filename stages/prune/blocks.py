"""Which blocks a model can do without, and what the others do to make up for it.

Shapes: N windows, T tokens, M = N T, H = O hidden, F feed-forward channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.algorithms.block_influence import influence
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import answers, arguments, embedded, together
from stages.models.blockwise.run import check_finite, in_short

CANDIDATES = 10
"""Blocks tried in a round: those that cost least in the round before. All of them take three times as long and the
choice is the same on the models that were measured."""

Enough = Callable[[Sequence[int]], bool]
"""Whether it is enough that these blocks go."""


@dataclass(frozen=True)
class Dropped:
    """A block that goes.

    Attributes:
        block: its index.
        cost: its influence, or the KL to the whole model in nats a token once it and those before it are gone.
    """

    block: int
    cost: float


@dataclass(frozen=True)
class _Measure:
    """What a model predicts without some blocks.

    Attributes:
        model: whole.
        ids_NT: the windows.
        blocks: of the model.
        calls: how each is called.
        log_p: what the whole model predicts of each window, [T / 2, V].
        sources: the windows of each.
    """

    model: PreTrainedModel
    ids_NT: Tensor
    blocks: Sequence[Block]
    calls: Sequence[Mapping[str, Any]]
    log_p: Sequence[Tensor]
    sources: Sequence[Sequence[int]]

    def kl(self, x_NTH: Tensor, start: int, gone: Collection[int]) -> float:
        """Of the source that it costs most, from the state before block `start` on without the blocks that are gone."""
        for x in _states(self.blocks, self.calls, x_NTH, gone, start):
            x_NTH = x
        found = []
        for log_p_TV, log_q_TV in zip(self.log_p, _log(self.model, self.ids_NT, x_NTH), strict=True):
            gap_TV = log_q_TV.neg_().add_(log_p_TV)
            found.append(float(gap_TV.mul_(log_p_TV.exp()).sum()) / len(gap_TV))
        return max(mean(found[at] for at in places) for places in self.sources)


def least_influential(
    model: PreTrainedModel,
    ids_NT: Tensor,
    enough: Enough,
    advanced: Callable[[int], None],
    sources: Sequence[str] = (),
) -> list[Dropped]:
    """Blocks in the order in which they go, those that change least what passes through them; arguments as `greedy`.

    Raises:
        StageError: an activation is not finite.
    """
    blocks, calls = anatomy.blocks(model), arguments(model, ids_NT.shape[1])
    with torch.no_grad():
        first_NTH = embedded(model, ids_NT)
        states = [first_NTH, *_states(blocks, calls, first_NTH, (), 0)]
    every = _places(len(ids_NT), sources)
    found = [
        max(influence(x[places].flatten(0, 1), y[places].flatten(0, 1)) for places in every)
        for x, y in pairwise(states)
    ]
    gone: list[Dropped] = []
    for index in sorted(range(len(found)), key=lambda index: (found[index], index))[:-1]:
        if enough([one.block for one in gone]):
            break
        gone.append(Dropped(index, found[index]))
        advanced(len(gone))
    return gone


def _places(windows: int, sources: Sequence[str]) -> list[list[int]]:
    """The windows of each source; all of them where there is one."""
    named = sources or [""] * windows
    return [[at for at, name in enumerate(named) if name == source] for source in dict.fromkeys(named)]


def greedy(
    model: PreTrainedModel,
    ids_NT: Tensor,
    enough: Enough,
    advanced: Callable[[int], None],
    sources: Sequence[str] = (),
) -> list[Dropped]:
    """Blocks in the order in which they go: each round the one without which the KL to the whole model is least.

    Args:
        model: is not changed; computed in a short float, whose noise is far below the differences between blocks.
        ids_NT: a few windows.
        enough: whether the blocks chosen so far suffice.
        advanced: told the number of blocks chosen.
        sources: of each window; of several it is the KL on the one that it is largest on, so that what is rare goes on
            being looked at.

    Returns:
        The blocks; all but one if it is never enough.

    Raises:
        StageError: an activation is not finite.

    Source: greedy removal by measured loss, as in Song et al., SLEB (2024), algorithm 1, with KL for the perplexity.
    """
    blocks, calls = anatomy.blocks(model), arguments(model, ids_NT.shape[1])
    gone: list[Dropped] = []
    candidates = [block.index for block in blocks]
    with torch.no_grad(), in_short():
        first_NTH = embedded(model, ids_NT)
        whole = _states(blocks, calls, first_NTH, (), 0)
        every = _places(len(ids_NT), sources)
        measure = _Measure(model, ids_NT, blocks, calls, [*_log(model, ids_NT, whole[-1])], every)
        del whole
        while candidates and len(gone) < len(blocks) - 1 and not enough([one.block for one in gone]):
            without = [one.block for one in gone]
            states = [first_NTH, *_states(blocks, calls, first_NTH, without, 0)]
            tried = {index: measure.kl(states[index], index + 1, without) for index in candidates}
            order = sorted(tried, key=lambda index: (tried[index], index))
            gone.append(Dropped(order[0], tried[order[0]]))
            left = [block.index for block in blocks if block.index not in {one.block for one in gone}]
            candidates = [index for index in order[1:] if index in left][:CANDIDATES] or left
            advanced(len(gone))
    return gone


def parameters_without(model: PreTrainedModel, dropped: Sequence[int]) -> int:
    """Parameters in the blocks that are left when these are gone, each distinct tensor counted once."""
    left = [block for block in anatomy.blocks(model) if block.index not in dropped]
    return sum({id(one): one.numel() for block in left for one in block.module.parameters()}.values())


def _states(
    blocks: Sequence[Block], calls: Sequence[Mapping[str, Any]], x_NTH: Tensor, gone: Collection[int], start: int
) -> list[Tensor]:
    """The state after each block from `start` on; a block that is gone hands on what it gets."""
    found = []
    for block, kwargs in list(zip(blocks, calls, strict=True))[start:]:
        if block.index not in gone:
            returned = block.module(x_NTH, **together(kwargs, len(x_NTH)))
            x_NTH = returned[0] if isinstance(returned, tuple) else returned
            check_finite(block.name, x_NTH)
        found.append(x_NTH)
    return found


def _log(model: PreTrainedModel, ids_NT: Tensor, x_NTH: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of each window by the model's own head, with whatever it does to its logits."""
    # Every second position: neighbours say much the same, and the head is a fifth of a small model's work.
    for logits_1TV in answers(model, ids_NT[:, ::2].split(1), x_NTH[:, ::2].split(1)):
        yield logits_1TV[0].float().log_softmax(-1)
