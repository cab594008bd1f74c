"""One pass over a model's blocks, the dense block beside the compressed one: each map is fitted to what it should give.

A compressed model's error grows from block to block because every map still answers the inputs of the dense model. Here
each map is compressed towards W* instead: the map that comes closest to the dense outputs on the inputs that the blocks
before it, compressed already, really give. For a map whose output is added to the residual stream, W* also makes up for
what that stream has drifted. The moments of one site at a time suffice; no gradient is needed.

An encoder's blocks come first; a decoder's then read what each model's own encoder gave. What the decoder itself reads
is the dense model's answer to each window.

Shapes: N windows, T tokens, S tokens of an encoder, M tokens at once, H hidden, I inputs and O outputs of a map.

Source: least squares on the inputs of both models, as in GPTAQ (Li et al. 2025) and QEP (Arai and Ichikawa 2025); the
drift of the residual stream is added here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import PROBE, Stack, arguments, embedded, filled, left, stacks
from stages.models.blockwise.replay import Replay
from stages.models.blockwise.run import check_finite, in_short
from stages.models.blockwise.site_moments import Moments, Seen, whole
from stages.models.blockwise.sites import Reached, added_to, listening, sites
from stages.models.memory.pages import forget, release, trim
from stages.models.memory.saved_state import read_record, save_state
from stages.models.memory.spill import Shelf
from stages.models.text.decoder_answers import NOTHING, answered

AT_ONCE = 2
"""Windows in one call of a block: weights are turned to bfloat16 once a call."""
IN_MEMORY = 2**24
"""Bytes of a text's stream up to which what a block gave stays in memory: that is about five times as much."""
INPUT, RESIDUAL = "input", "residual"
SAVE_EVERY_S = 5.0
"""Both streams of a text are large beside a small model's block: they are written after the block that ends next."""


@dataclass(frozen=True)
class Compressed:
    """One map's new tensors by name, and its row for the table."""

    tensors: Mapping[str, Tensor]
    row: Mapping[str, Any]


class Technique(Protocol):
    """How one site's maps are compressed. Names are paths in the model."""

    def enter(self, block: Block) -> None:
        """Told of each block in order, dense still, before it runs; what changes there must leave its outputs."""

    def begin(self, names: Sequence[str], peak: float) -> None:
        """Told the largest magnitude that a site's maps read in the dense model, before anything else of the site."""

    def read(self, name: str, z_MI: Tensor) -> Tensor:
        """What a map will read of its input: rounded, or as it is."""

    def compress(self, block: Block, found: Mapping[str, nn.Linear], seen: Seen) -> Mapping[str, Compressed]:
        """New tensors for the maps that read one input, by path in the model. Maps that are left out stay."""

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Put a map's new tensors in its place; the same tensors make the same module."""


@dataclass(frozen=True)
class Ends:
    """What the caller does with both streams where they begin and end.

    Attributes:
        enter: the compressed model's stream before its first block, a tensor of its own, from the dense model's.
        leave: told both streams, dense and compressed, after the last block.
    """

    enter: Callable[[Tensor], Tensor] = Tensor.clone
    leave: Callable[[Tensor, Tensor], None] = lambda x_NTH, z_NTH: None


def compress(
    model: PreTrainedModel,
    ids_NT: Tensor,
    technique: Technique,
    state: Path,
    advanced: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
    timed: Callable[[str, float, int], None] = lambda name, seconds, block: None,
    gone: Collection[int] = (),
    ends: Ends = Ends(),
) -> list[dict[str, Any]]:
    """Compress the maps of every block in the order in which they run, each on what the ones before it give.

    The compressed model runs without the blocks that are `gone`; what is added to the stream last before such a gap is
    fitted to the dense stream after it.

    After each block its new tensors and both streams lie in `state`; a later call goes on after the last such block.

    Args:
        model: its blocks' maps are replaced; no weight is changed in place.
        ids_NT: calibration windows.
        technique: what to do with a site.
        state: folder that keeps it.
        advanced: told (blocks done, blocks).
        note: told of a resume.
        gone: indices of blocks that the compressed model has not; the caller takes them out.
        ends: what the caller does with both streams at their ends.
        timed: told ("block_seconds", seconds, block): clocks stay out of the rows, since the same work makes the same.

    Returns:
        A row a map: its path and the technique's figures.

    Raises:
        StageError: an activation is not finite, or a map reads nothing.
    """
    model.requires_grad_(False)
    every, total = stacks(model), len(anatomy.blocks(model))
    parts = [ids_NT, answered(model, ids_NT, state / "answers.safetensors")] if len(every) > 1 else [ids_NT]
    done, rows, streams = _resumed(model, technique, state)
    if done:
        note(f"goes on after block {done} of {total}, saved before it was cut off")
    saved = time.monotonic()
    for stack, part_NT in zip(every, parts, strict=True):
        blocks, first = stack.blocks, stack.blocks[0].index
        calls, short = arguments(stack, part_NT.shape[1]), arguments(stack, min(PROBE, part_NT.shape[1]))
        beside = Beside()
        if stack.after is not None:
            counted_NT = part_NT != NOTHING
            beside = Beside(_read(stack.after, streams if done <= first else None, state), counted_NT)
            part_NT, streams = part_NT * counted_NT, streams if done > first else None
        if streams is None:
            streams = _entering(stack, part_NT, ends)
            _through(_gap(blocks, calls, 0, gone), streams[0])
        trim()
        for block, kwargs, probe in list(zip(blocks, calls, short, strict=True))[max(0, done - first) :]:
            if block.index in gone:
                advanced(block.index + 1, total)
                continue
            began = time.monotonic()
            gap = _gap(blocks, calls, block.index - first + 1, gone)
            rows += _turn(model, block, (kwargs, probe), streams, technique, gap, beside, state)
            if time.monotonic() - saved >= SAVE_EVERY_S:
                _save_streams(state, block.index, *streams)
                saved = time.monotonic()
            timed("block_seconds", time.monotonic() - began, block.index)
            advanced(block.index + 1, total)
    assert streams is not None
    ends.leave(*streams)
    return rows


def _turn(
    model: PreTrainedModel,
    block: Block,
    calls: tuple[Mapping[str, Any], Mapping[str, Any]],
    streams: tuple[Tensor, Tensor],
    technique: Technique,
    gap: Gap,
    beside: Beside,
    state: Path,
) -> list[dict[str, Any]]:
    """Compress a block, keep its tensors in `state`, and give back the memory of the dense ones; returns its rows."""
    dense = list(block.module.parameters())
    technique.enter(block)
    new, rows = _block(model, block, calls, streams, technique, gap, beside, state)
    save_state(state / _file(block.index), new, {"rows": rows})
    _apply(model, technique, state / _file(block.index))
    release(block.module)
    for tensor in dense:
        forget(tensor)
    del dense
    trim()
    return rows


def _entering(stack: Stack, ids_NT: Tensor, ends: Ends) -> tuple[Tensor, Tensor]:
    x_NTH = embedded(stack, ids_NT)
    return x_NTH, ends.enter(x_NTH)


def _read(stack: Stack, streams: tuple[Tensor, Tensor] | None, state: Path) -> tuple[Tensor, Tensor]:
    """What both models' encoders give, from the streams at their ends, or as kept when they were there."""
    path = state / "encoded.safetensors"
    if streams is not None:
        save_state(
            path, {name: left(stack, one) for name, one in zip(("dense", "compressed"), streams, strict=True)}, {}
        )
    kept = load_file(path)
    return kept["dense"], kept["compressed"]


@dataclass(frozen=True)
class Beside:
    """What a stack's run takes beside its stream.

    Attributes:
        read: what the stack before gave, [N, S, H], in the dense and in the compressed model.
        counted_NT: positions that count; None for all.
    """

    read: tuple[Tensor, Tensor] | None = None
    counted_NT: Tensor | None = None

    def calls(self, kwargs: Mapping[str, Any], model: int, windows: int) -> list[dict[str, Any]]:
        """The arguments of each call: model 0 is the dense one."""
        if self.read is None:
            return [dict(kwargs)] * -(-windows // AT_ONCE)
        return [filled(kwargs, read_NSH) for read_NSH in self.read[model].split(AT_ONCE)]

    def probe(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of a few tokens."""
        return filled(kwargs, None if self.read is None else self.read[0][:1, :PROBE])

    def rows(self, x: Tensor, call: int, kwargs: Mapping[str, Any]) -> Tensor:
        """x_MI of [n, T, I] that a map reads or adds to in one call: what counts of it."""
        if self.counted_NT is None or any(isinstance(one, Tensor) and _is(one, x) for one in kwargs.values()):
            return x.flatten(0, -2)
        return x[self.counted_NT[call * AT_ONCE : (call + 1) * AT_ONCE]]


def _is(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


Gap = Sequence[tuple[Block, Mapping[str, Any]]]
"""Blocks of the dense model alone, each with its arguments."""


def _gap(blocks: Sequence[Block], calls: Sequence[Mapping[str, Any]], start: int, gone: Collection[int]) -> Gap:
    return list(takewhile(lambda one: one[0].index in gone, list(zip(blocks, calls, strict=True))[start:]))


def _through(gap: Gap, x_NTH: Tensor) -> None:
    """Run the dense stream through a gap, in place."""
    for block, kwargs in gap:
        for batch in x_NTH.split(AT_ONCE):
            batch.copy_(_call(block, batch, kwargs))
        release(block.module)


class _Kept:
    """What the dense block gave, call by call: inputs of each site by its first map, and what outputs are added to.

    Of a long text it is the most that a pass holds: then it waits on disk.
    """

    def __init__(self, x_NTH: Tensor, folder: Path) -> None:
        self._shelf = Shelf(folder) if x_NTH.nbytes > IN_MEMORY else None
        self._held: dict[tuple[str, str], Tensor] = {}
        self.peaks: dict[str, float] = {}

    def put(self, what: str, path: str, call: int, x_MI: Tensor) -> None:
        """Keep `input` or `residual` of a map in one call."""
        if what == INPUT:
            self.peaks[path] = max(float(x_MI.abs().max()), self.peaks.get(path, 0.0))
        if self._shelf is None:
            self._held[path, f"{what}.{call}"] = x_MI
        else:
            self._shelf.put(path, {f"{what}.{call}": x_MI})

    def take(self, what: str, path: str, call: int) -> Tensor:
        """Give it back, once."""
        name = f"{what}.{call}"
        return self._held.pop((path, name)) if self._shelf is None else self._shelf.get(path, name)


def _block(
    model: PreTrainedModel,
    block: Block,
    calls: tuple[Mapping[str, Any], Mapping[str, Any]],
    streams: tuple[Tensor, Tensor],
    technique: Technique,
    gap: Gap,
    beside: Beside,
    state: Path,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """New tensors and rows of one block; both streams are what comes out of it afterwards.

    `calls` are its arguments for a window, and for the first few tokens of one; `gap` the dense blocks after it that
    are gone.
    """
    x_NTH, z_NTH = streams
    probe = beside.probe(calls[1])
    theirs, mine = (beside.calls(calls[0], model, len(x_NTH)) for model in (0, 1))
    few_1TH = x_NTH[:1, :PROBE]
    found = sites(block, few_1TH, probe)
    added = added_to(block, [path for site in found for path in site], few_1TH, probe)
    kept = _Kept(x_NTH, state)
    _dense(block, found, added, x_NTH, theirs, kept, gap, beside)
    new: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    runs = [Replay() for _ in z_NTH.split(AT_ONCE)]
    for site in found:
        maps = {path: block.module.get_submodule(path) for path in site}
        technique.begin([f"{block.name}.{path}" for path in site], kept.peaks[site[0]])
        reads = partial(technique.read, f"{block.name}.{site[0]}")
        seen = _seen(block, site, added, kept, z_NTH, mine, reads, runs, beside)
        trim()  # what the runs left lies between what is still used: here the most memory is taken
        made = technique.compress(block, maps, seen)  # type: ignore[arg-type]
        del seen
        for path, one in made.items():
            technique.apply(model, f"{block.name}.{path}", one.tensors)
            if hold := getattr(block.module.get_submodule(path), "hold", None):
                hold()  # until the tensors are read back from the file
        for path, one in made.items():
            name = f"{block.name}.{path}"
            new |= {f"{name}:{tensor}": value for tensor, value in one.tensors.items()}
            rows.append({"layer": name, "block": block.index, **one.row})
    for batch, run, kwargs in zip(z_NTH.split(AT_ONCE), runs, mine, strict=True):
        with run:
            y_NTH = _call(block, batch, kwargs)
        batch.copy_(y_NTH)
    _finite(block.name, z_NTH)
    return new, rows


def _dense(
    block: Block,
    found: list[list[str]],
    added: Mapping[str, str],
    x_NTH: Tensor,
    calls: Sequence[Mapping[str, Any]],
    kept: _Kept,
    gap: Gap,
    beside: Beside,
) -> None:
    """Run the dense block and the gap after it; inputs are kept as bfloat16, what is added to as it is."""
    for call, (batch, kwargs) in enumerate(zip(x_NTH.split(AT_ONCE), calls, strict=True)):
        with listening(block, [site[0] for site in found], added) as heard:
            y_NTH = _call(block, batch, kwargs)
        _through(gap, y_NTH)
        for site in found:
            x_MI = beside.rows(heard.inputs[site[0]], call, kwargs)
            kept.put(INPUT, site[0], call, x_MI.bfloat16())
        for path in added:
            residual_MO = beside.rows(heard.residual(path, y_NTH), call, kwargs)
            kept.put(RESIDUAL, path, call, residual_MO)
        batch.copy_(y_NTH)
    _finite(block.name, x_NTH)


def _seen(
    block: Block,
    site: list[str],
    added: Mapping[str, str],
    kept: _Kept,
    z_NTH: Tensor,
    calls: Sequence[Mapping[str, Any]],
    read: Callable[[Tensor], Tensor],
    runs: Sequence[Replay],
    beside: Beside,
) -> Seen:
    """Moments of one site, from a run of the compressed block that ends there."""
    adding = {path: added[path] for path in site if path in added}
    first = site[0]
    width = int(block.module.get_submodule(first).in_features)  # type: ignore[arg-type]
    halves = tuple(Moments(torch.zeros(width, width), torch.zeros(width, width)) for _ in range(2))
    tokens = 0
    for call, (batch, run, kwargs) in enumerate(zip(z_NTH.split(AT_ONCE), runs, calls, strict=True)):
        y_NTH = None
        with run, listening(block, [first], adding, stop=True, reached=run.mark) as heard:
            try:
                y_NTH = _call(block, batch, kwargs)
            except Reached:
                pass
        z_MI = read(beside.rows(heard.inputs[first], call, kwargs).float())
        x_MI, tokens = kept.take(INPUT, first, call), tokens + len(z_MI)
        sums = {path: beside.rows(heard.residual(path, y_NTH), call, kwargs) for path in adding}
        gaps = {path: kept.take(RESIDUAL, path, call) - s_MO for path, s_MO in sums.items()}
        middle = len(z_MI) // 2
        for half, rows in zip(halves, (slice(0, middle), slice(middle, None)), strict=True):
            half.add(x_MI[rows], z_MI[rows], {path: gap_MO[rows] for path, gap_MO in gaps.items()})
    return whole(f"{block.name}.{first}", halves[0], halves[1], tokens)


def _call(block: Block, x_NTH: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    # Both streams are rounded alike, and the moments' errors stay far below what compression does.
    with torch.no_grad(), in_short():
        returned = block.module(x_NTH, **kwargs)
    y_NTH: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return y_NTH.float()


def _finite(name: str, x: Tensor) -> Tensor:
    check_finite(name, x)
    return x


def _file(index: int) -> str:
    return f"block-{index:04d}.safetensors"


def _save_streams(state: Path, index: int, x_NTH: Tensor, z_NTH: Tensor) -> None:
    new = state / f"streams-{index:04d}.safetensors"
    save_state(new, {"dense": x_NTH, "compressed": z_NTH}, {})
    for old in state.glob("streams-*.safetensors"):
        if old != new:
            old.unlink()


def _resumed(
    model: PreTrainedModel, technique: Technique, state: Path
) -> tuple[int, list[dict[str, Any]], tuple[Tensor, Tensor] | None]:
    """How many blocks are done, their rows, and the streams after them; their new maps are put in."""
    found = sorted(state.glob("streams-*.safetensors"))
    if not found:
        return 0, [], None
    rows: list[dict[str, Any]] = []
    done = int(found[-1].stem.rpartition("-")[2]) + 1
    for index, block in enumerate(anatomy.blocks(model)[:done]):
        record = read_record(state / _file(index))
        if record is None:
            continue  # this block is gone: every other one's file is written before the streams
        technique.enter(block)
        _apply(model, technique, state / _file(index))
        rows += record["rows"]
    streams = load_file(found[-1])
    return done, rows, (streams["dense"], streams["compressed"])


def _apply(model: PreTrainedModel, technique: Technique, file: Path) -> None:
    """Put a block's tensors in their places as views of the file: they take memory when they are read."""
    by_path: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        path, _, own = name.rpartition(":")
        by_path.setdefault(path, {})[own] = tensor
    for path, tensors in by_path.items():
        technique.apply(model, path, tensors)
