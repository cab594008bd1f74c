"""The residual streams of the dense and of the compressed model, side by side from block to block.

Shapes: N windows, n of them in one call, T tokens, S tokens of an encoder, M tokens that count, H hidden, I inputs of a
map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import PROBE, Stack, embedded, filled, left, runs, together
from stages.models.blockwise.run import in_short, output
from stages.models.memory.pages import release
from stages.models.memory.saved_state import save_state
from stages.models.text.decoder_answers import NOTHING
from stages.runtime.contract import StageError

AT_ONCE = 2
"""Windows in one call of a block: weights are turned to bfloat16 once a call."""
Gap = Sequence[tuple[Block, Mapping[str, Any]]]
"""Blocks of the dense model alone, each with its arguments."""


@dataclass(frozen=True)
class Streams:
    """What goes into a block in both models, float32; each block writes what it gives in its place."""

    dense_NTH: Tensor
    compressed_NTH: Tensor


@dataclass(frozen=True)
class Ends:
    """What the caller does with both streams where they begin and end.

    Attributes:
        enter: the compressed model's stream before its first block, a tensor of its own, from the dense model's.
        leave: told both streams, dense and compressed, after the last block.
    """

    enter: Callable[[Tensor], Tensor] = Tensor.clone
    leave: Callable[[Tensor, Tensor], None] = lambda x_NTH, z_NTH: None


@dataclass(frozen=True)
class Beside:
    """What a stack's run takes beside its stream.

    Attributes:
        read: what the stack before gave, [N, S, H], in the dense and in the compressed model.
        counted_NT: positions that count; None for all.
    """

    read: tuple[Tensor, Tensor] | None = None
    counted_NT: Tensor | None = None

    def calls(self, kwargs: Mapping[str, Any], model: int, windows: int) -> list[Mapping[str, Any]]:
        """The arguments of each call: model 0 is the dense one."""
        if self.read is None:
            return [kwargs] * -(-windows // AT_ONCE)
        return [filled(kwargs, read_NSH) for read_NSH in self.read[model].split(AT_ONCE)]

    def probe(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of a few tokens."""
        return filled(kwargs, None if self.read is None else self.read[0][:1, :PROBE])

    def rows(self, x: Tensor, call: int, kwargs: Mapping[str, Any]) -> Tensor:
        """x_MI of [n, T, I] that a map reads or adds to in one call: what counts of it."""
        counted_nT = self._counted(x, call, kwargs)
        return x.flatten(0, -2) if counted_nT is None else x[counted_nT]

    def places(self, x: Tensor, call: int, kwargs: Mapping[str, Any]) -> Tensor:
        """Of each of those rows, the number of its window in the call."""
        numbers_nT = torch.arange(len(x))[:, None].expand(len(x), x.shape[1])
        counted_nT = self._counted(x, call, kwargs)
        return numbers_nT.flatten() if counted_nT is None else numbers_nT[counted_nT]

    def _counted(self, x: Tensor, call: int, kwargs: Mapping[str, Any]) -> Tensor | None:
        if self.counted_NT is None or any(isinstance(one, Tensor) and _is(one, x) for one in kwargs.values()):
            return None
        return self.counted_NT[call * AT_ONCE : (call + 1) * AT_ONCE]


@dataclass(frozen=True)
class Turn:
    """A block and all that its runs take but the streams.

    Attributes:
        block: whose turn it is.
        kwargs: its arguments for a window; see `block_calls.filled`.
        probe: for the first few tokens of one.
        gap: the dense blocks after it that the compressed model has not.
        beside: see there.
        times: how often it runs in a row.
    """

    block: Block
    kwargs: Mapping[str, Any]
    probe: Mapping[str, Any]
    gap: Gap
    beside: Beside
    times: int = 1


def turns(stack: Stack, tokens: int, reads: Beside, gone: Collection[int]) -> tuple[Gap, list[Turn]]:
    """The gap before a stack's first turn, and a turn for each of its blocks, those that are `gone` too.

    Raises:
        StageError: what the stack reads of the one before is not understood.
    """
    calls, short = runs(stack, tokens), runs(stack, min(PROBE, tokens))
    if reads.read is not None and any(times > 1 for times, _ in calls):
        raise StageError(f"{stack.blocks[0].name} reads an encoder and is run several times: it is not understood")
    dense = [(block, kwargs, times) for block, (times, kwargs) in zip(stack.blocks, calls, strict=True)]

    def gap(start: int) -> Gap:
        there = takewhile(lambda one: one[0].index in gone, dense[start:])
        return [(block, kwargs) for block, kwargs, times in there for _ in range(times)]

    each = [
        Turn(block, kwargs, probe, gap(place + 1), reads, times)
        for place, ((block, kwargs, times), (_, probe)) in enumerate(zip(dense, short, strict=True))
    ]
    return gap(0), each


def beside(stack: Stack, ids_NT: Tensor, streams: Streams | None, state: Path) -> Beside:
    """What a stack's run takes beside its stream.

    Args:
        stack: about to run.
        ids_NT: its tokens, NOTHING where none counts.
        streams: at the end of the stack before; None where what it gave was kept in `state` when they were there.
        state: folder that keeps it.
    """
    if stack.after is None:
        return Beside()
    path = state / "encoded.safetensors"
    if streams is not None:
        both = {"dense": streams.dense_NTH, "compressed": streams.compressed_NTH}
        save_state(path, {name: left(stack.after, one) for name, one in both.items()}, {})
    kept = load_file(path)
    return Beside((kept["dense"], kept["compressed"]), ids_NT != NOTHING)


def entering(stack: Stack, ids_NT: Tensor, reads: Beside, gap: Gap, ends: Ends) -> Streams:
    """Both streams before a stack's first block, the dense one after a gap there."""
    x_NTH = embedded(stack, ids_NT if reads.counted_NT is None else ids_NT * reads.counted_NT)
    z_NTH = ends.enter(x_NTH)
    through(gap, x_NTH)
    return Streams(x_NTH, z_NTH)


def through(gap: Gap, x_NTH: Tensor) -> None:
    """Run the dense stream through a gap, in place."""
    for block, kwargs in gap:
        for batch in x_NTH.split(AT_ONCE):
            batch.copy_(called(block, batch, kwargs))
        release(block.module)


def all_runs(turn: Turn, streams: Streams) -> Streams:
    """What a block that runs several times reads in all its runs, one under another, [times * N, T, H].

    The compressed model is taken to read what the dense one does but in the first: one map is fitted to all runs.
    """
    reads = [streams.dense_NTH]
    for _ in range(turn.times - 1):
        reads.append(reads[-1].clone())
        through([(turn.block, turn.kwargs)], reads[-1])
    return Streams(torch.cat(reads), torch.cat([streams.compressed_NTH, *reads[1:]]))


def called(block: Block, x_NTH: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """What a block gives for some windows, float32."""
    # Both streams are rounded alike, and the moments' errors stay far below what compression does.
    with torch.no_grad(), in_short():
        return output(block.module(x_NTH, **together(kwargs, len(x_NTH)))).float()


def save_streams(state: Path, index: int, streams: Streams) -> None:
    """Write both streams as they are after block `index`; former ones go."""
    new = state / f"streams-{index:04d}.safetensors"
    save_state(new, {"dense": streams.dense_NTH, "compressed": streams.compressed_NTH}, {})
    for old in state.glob("streams-*.safetensors"):
        if old != new:
            old.unlink()


def resumed(state: Path) -> tuple[int, Streams | None]:
    """How many blocks were done when streams were written last, and these; 0 and None where none were."""
    found = sorted(state.glob("streams-*.safetensors"))
    if not found:
        return 0, None
    kept = load_file(found[-1])
    return int(found[-1].stem.rpartition("-")[2]) + 1, Streams(kept["dense"], kept["compressed"])


def _is(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
