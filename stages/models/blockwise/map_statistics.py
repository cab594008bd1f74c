"""What every map of every stack reads, and how the model's answers depend on what it gives: found by running.

Maps are known by their paths, so that blocks of any kind are measured: an encoder's and a decoder's, one that runs
several times, with fused maps and with none that gates.

Shapes: N windows, T tokens, S tokens of an encoder, H hidden, I inputs and O outputs of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.products import gram
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import PROBE, Stack, embedded, filled, leaving, left, runs, stacks
from stages.models.blockwise.drawn_labels import drawn_gradient
from stages.models.blockwise.run import check_finite, in_short, output, watched
from stages.models.blockwise.sites import sites
from stages.models.memory.pages import release
from stages.models.memory.spill import Shelf
from stages.models.text.decoder_answers import NOTHING, answered


@dataclass
class MapStatistics:
    """What calibration saw of one block's maps, by their paths in it.

    Attributes:
        first: map -> the first map that reads the same tensor: its site.
        moments: site -> E[x x^T] over what its maps read, [I, I].
        gradients: map -> sum of g^2 at each output over all that it reads, a token of the model's answers, [O]: the
            diagonal of the Fisher information, since labels are drawn from what the model says.
        sources: site -> source -> the moment over its windows, where it was asked for.
    """

    first: dict[str, str]
    moments: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class BySource:
    """Which moments are wanted of each source by its own, too.

    Attributes:
        names: the source of each window; empty for none.
        maps: of a block, those that read what is wanted.
    """

    names: Sequence[str] = ()
    maps: Callable[[Block], Collection[str]] = lambda _block: ()


_WHOLE = BySource()


@dataclass(frozen=True)
class _Way:
    """One stack's run: its text, what it reads of the stack before, how often and with what each block runs, and the
    latter for the first few tokens.
    """

    stack: Stack
    ids_NT: Tensor
    read_NSH: Tensor | None
    calls: Sequence[tuple[int, Mapping[str, Any]]]
    short: Sequence[tuple[int, Mapping[str, Any]]]

    @property
    def counted_NT(self) -> Tensor:
        """Positions that count."""
        return self.ids_NT != NOTHING

    def arguments(self, place: int, window: int) -> dict[str, Any]:
        """Of a block for one window."""
        read_NSH = self.read_NSH
        return filled(self.calls[place][1], None if read_NSH is None else read_NSH[window : window + 1])


def statistics_of(
    model: PreTrainedModel,
    ids_NT: Tensor,
    folder: Path,
    advanced: Callable[[float, float], None],
    by_source: BySource = _WHOLE,
) -> Iterator[tuple[Block, MapStatistics]]:
    """Each block with the statistics of all maps that run in it, from the last block to the first.

    One forward sweep over all windows takes the moments. A backward sweep over the first half of them computes each
    block again with gradients, so that no more than one block's graph is alive; the gradients' mean squares settle
    with fewer tokens than the moments. A decoder reads the model's own answers to the windows.

    Args:
        model: its parameters' gradients are not needed and are turned off.
        ids_NT: calibration windows.
        folder: where each block's inputs and moments, and answers, wait.
        advanced: told (done, total) in block passes.
        by_source: which moments are wanted by source.

    Raises:
        StageError: an activation is not finite.
    """
    model.requires_grad_(False)
    every = stacks(model)
    graded, total = -(-len(ids_NT) // 2), 3 * sum(len(stack.blocks) for stack in every)
    # The gradients of half the windows take about two forward passes of all.
    parts = [ids_NT] if len(every) == 1 else [ids_NT, answered(model, ids_NT, folder / "answers.safetensors")]
    waiting, ways, ends, found = Shelf(folder), list[_Way](), list[Tensor](), dict[int, MapStatistics]()
    for stack, part_NT in zip(every, parts, strict=True):
        way = _way(stack, part_NT, left(every[0], ends[0]) if ends else None)
        x_NTH = embedded(stack, part_NT * way.counted_NT)
        for place, block in enumerate(stack.blocks):
            here = found[block.index] = _begun(block, x_NTH, way, place, by_source)
            for run in range(way.calls[place][0]):
                waiting.put((block.index, run), {"input": x_NTH[:graded]})
                x_NTH = _forward(block, x_NTH, way, place, here, by_source.names)
            _put(waiting, block.index, here)
            release(block.module)
            advanced(block.index + 1, total)
        ways.append(way)
        ends.append(x_NTH[:graded] if stack is every[-1] else x_NTH)
    counted_NT = ways[-1].counted_NT[:graded]
    g_NTH = drawn_gradient(model, parts[-1][:graded] * counted_NT, ends[-1], *parts[:-1]) * counted_NT[..., None]
    for way, end_NTH in zip(reversed(ways), reversed(ends), strict=True):
        if way is not ways[-1]:
            x_NTH = end_NTH[:graded].detach().requires_grad_()
            slopes = zip(leaving(way.stack, x_NTH), g_NTH.split(1), strict=True)
            g_NTH = torch.stack([torch.autograd.grad(y, x_NTH, g)[0][n] for n, (y, g) in enumerate(slopes)])
        g_read = None if way.read_NSH is None else torch.zeros_like(way.read_NSH[:graded])
        for place, block in reversed(list(enumerate(way.stack.blocks))):
            mine = found.pop(block.index)
            for run in reversed(range(way.calls[place][0])):
                x_NTH = waiting.get((block.index, run), "input")
                g_NTH = _backward(block, x_NTH, g_NTH, way, place, mine.gradients, g_read)
            _finish(waiting, block.index, mine, int(counted_NT.sum()))
            advanced(total - 2 * block.index, total)
            yield block, mine
            release(block.module)
        g_NTH = g_NTH if g_read is None else g_read


def _way(stack: Stack, ids_NT: Tensor, read_NSH: Tensor | None) -> _Way:
    tokens = ids_NT.shape[1]
    return _Way(stack, ids_NT, read_NSH, runs(stack, tokens), runs(stack, min(PROBE, tokens)))


def _begun(block: Block, x_NTH: Tensor, way: _Way, place: int, by_source: BySource) -> MapStatistics:
    """Statistics of a block that nothing was seen of yet."""
    found = MapStatistics(_firsts(block, x_NTH, way, place))
    if by_source.names:
        found.sources = {found.first[path]: {} for path in by_source.maps(block) if path in found.first}
    return found


def _put(waiting: Shelf, index: int, seen: MapStatistics) -> None:
    """Let a block's moments wait."""
    waiting.put(index, seen.moments)
    for path, each in seen.sources.items():
        waiting.put((index, path), each)
    seen.moments, seen.sources = {}, {path: {} for path in seen.sources}


def _finish(waiting: Shelf, index: int, into: MapStatistics, tokens: int) -> None:
    """Take them back, and make means of the gradients' squares."""
    into.moments = waiting.take(index)
    into.gradients = {path: one / tokens for path, one in into.gradients.items()}
    into.sources = {path: waiting.take((index, path)) for path in into.sources}


def _firsts(block: Block, x_NTH: Tensor, way: _Way, place: int) -> dict[str, str]:
    """Every map that runs -> the first one that reads the same."""
    few = min(PROBE, x_NTH.shape[1])
    read = None if way.read_NSH is None else way.read_NSH[:1, :PROBE]
    found = sites(block, x_NTH[:1, :few], filled(way.short[place][1], read), idle=True)
    return {path: site[0] for site in found for path in site}


def _forward(block: Block, x_NTH: Tensor, way: _Way, place: int, into: MapStatistics, names: Sequence[str]) -> Tensor:
    """The block's output; the moments grow by its maps' inputs, as means over all that is read in all runs."""
    first = {path: block.module.get_submodule(path) for path in dict.fromkeys(into.first.values())}
    runs_of_it, counted_N = way.calls[place][0], way.counted_NT.sum(1)

    def add(path: str, x_TI: Tensor, rows_N: Tensor, window: int) -> None:
        with torch.autocast("cpu", enabled=False):
            gram_II = gram(x_TI)
        _grow(into.moments, path, gram_II, 1 / (int(rows_N.sum()) * runs_of_it))
        if path in into.sources:
            name = names[window]
            of_it = int(rows_N[[one == name for one in names]].sum())
            _grow(into.sources[path], name, gram_II, 1 / (of_it * runs_of_it))

    outputs = []
    for window, x_1TH in enumerate(x_NTH.split(1)):
        heard: dict[str, Tensor] = {}
        kwargs, counted_T = way.arguments(place, window), way.counted_NT[window]
        with torch.no_grad(), in_short(), watched(first, partial(_keep_input, heard)):
            outputs.append(output(block.module(x_1TH, **kwargs)).float())
        for path, x in heard.items():
            x_TI = x.flatten(0, -2).float()
            if way.read_NSH is not None and x.data_ptr() == way.read_NSH[window].data_ptr():
                add(path, x_TI, torch.full_like(counted_N, way.read_NSH.shape[1]), window)
            else:
                add(path, x_TI if counted_T.all() else x_TI[counted_T], counted_N, window)
    y_NTH = torch.cat(outputs)
    check_finite(block.name, y_NTH)
    return y_NTH


def _grow(sums: dict[str, Tensor], name: str, gram_II: Tensor, share: float) -> None:
    """Add a share of it in place: of wide maps the sums are the most that a pass writes."""
    if name in sums:
        sums[name].add_(gram_II, alpha=share)
    else:
        sums[name] = gram_II * share


def _keep_input(inputs: dict[str, Tensor], path: str, x: Tensor, _y: Tensor) -> None:
    inputs.setdefault(path, x.detach())  # of the first run, see `sites.sites`


def _backward(
    block: Block,
    x_NTH: Tensor,
    g_NTH: Tensor,
    way: _Way,
    place: int,
    squares: dict[str, Tensor],
    g_read: Tensor | None,
) -> Tensor:
    """The gradient at the block's input; `squares` grow by those at its maps' outputs, `g_read` by what it reads."""
    paths = [path for path, one in block.module.named_modules() if isinstance(one, nn.Linear)]
    outgoing = []
    for window, (x_TH, g_TH) in enumerate(zip(x_NTH, g_NTH, strict=True)):
        outputs: dict[str, Tensor] = {}
        x_1TH = x_TH[None].detach().requires_grad_()
        read = None if way.read_NSH is None else way.read_NSH[window : window + 1].detach().requires_grad_()
        keep = partial(_keep, outputs)
        with watched({path: block.module.get_submodule(path) for path in paths}, keep), in_short():
            y_1TH = output(block.module(x_1TH, **filled(way.calls[place][1], read))).float()
        wanted = [x_1TH, *([] if read is None else [read]), *outputs.values()]
        found = torch.autograd.grad(y_1TH, wanted, g_TH[None], materialize_grads=True)
        outgoing.append(found[0][0])
        if read is not None and g_read is not None:
            g_read[window] += found[1][0]
        for path, g in zip(outputs, found[len(found) - len(outputs) :], strict=True):
            square_O = g.float().square().flatten(0, -2).sum(0)
            squares[path] = squares[path] + square_O if path in squares else square_O
    return torch.stack(outgoing)


def _keep(outputs: dict[str, Tensor], path: str, _x: Tensor, y: Tensor) -> None:
    outputs.setdefault(path, y)
