"""One block's turn in a pass: its sites as they run, each compressed on what the ones before it give.

Shapes: N windows, T tokens, M tokens at once, H hidden, I inputs and O outputs of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.blockwise.block_calls import PROBE
from stages.models.blockwise.replay import Replay
from stages.models.blockwise.run import check_finite
from stages.models.blockwise.site_moments import Moments, Seen, SourceSums, whole
from stages.models.blockwise.sites import Reached, added_to, listening, sites
from stages.models.blockwise.streams import AT_ONCE, Streams, Turn, all_runs, called, through
from stages.models.blockwise.technique import Compressed, OnWeights, Technique
from stages.models.memory.pages import trim
from stages.models.memory.spill import Shelf

IN_MEMORY = 2**24
"""Bytes of a text's stream up to which what a block gave stays in memory: that is about five times as much."""
INPUT, RESIDUAL = "input", "residual"

Calls = Sequence[tuple[Tensor, Replay, Mapping[str, Any]]]
"""Of the compressed block, call by call: some windows of its stream, what their runs gave, and the arguments."""


class _Kept:
    """What the dense block gave, call by call: inputs of each site by its first map, and what outputs are added to.

    Of a long text it is the most that a pass holds: then it waits on disk.

    Attributes:
        added: path of a map whose output is added to something -> where the sum is read; see `added_to`.
        peaks: first map of a site -> the largest magnitude that it read.
    """

    def __init__(self, added: Mapping[str, str], x_NTH: Tensor, folder: Path) -> None:
        self._shelf = Shelf(folder) if x_NTH.nbytes > IN_MEMORY else None
        self._held: dict[tuple[str, str], Tensor] = {}
        self.added = added
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


def at_all_runs(
    model: PreTrainedModel, turn: Turn, streams: Streams, technique: Technique, folder: Path
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """As `at_sites`, of a block that may run several times in a row: its maps are fitted to all of its runs."""
    if turn.times == 1:
        return at_sites(model, turn, streams, technique, folder)
    many = all_runs(turn, streams)
    made = at_sites(model, replace(turn, gap=[]), many, technique, folder)
    streams.dense_NTH.copy_(many.dense_NTH[-len(streams.dense_NTH) :])
    through(turn.gap, streams.dense_NTH)
    for batch in streams.compressed_NTH.split(AT_ONCE):
        for _ in range(turn.times):
            batch.copy_(called(turn.block, batch, turn.kwargs))
    return made


def at_sites(
    model: PreTrainedModel, turn: Turn, streams: Streams, technique: Technique, folder: Path
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """New tensors of one block by "path:name", and its rows; both streams are what comes out of it afterwards.

    What the dense block gives waits in `folder` where it is much.

    Raises:
        StageError: an activation is not finite, or a map reads nothing where none may be idle.
    """
    block, x_NTH, z_NTH = turn.block, streams.dense_NTH, streams.compressed_NTH
    probe = turn.beside.probe(turn.probe)
    few_1TH = x_NTH[:1, :PROBE]
    found = sites(block, few_1TH, probe, idle=technique.idle)
    added = added_to(block, [path for site in found for path in site], few_1TH, probe)
    if isinstance(technique, OnWeights):
        found = [site for site in found if technique.reads(block, site, added.keys() & {*site})]
        added = {path: added[path] for site in found for path in site if path in added}
    kept = _Kept(added, x_NTH, folder)
    _dense(turn, found, x_NTH, kept)
    new: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    mine = turn.beside.calls(turn.kwargs, 1, len(z_NTH))
    calls = [(batch, Replay(), kwargs) for batch, kwargs in zip(z_NTH.split(AT_ONCE), mine, strict=True)]
    for site in found:
        technique.begin([f"{block.name}.{path}" for path in site], kept.peaks[site[0]])
        seen = _seen(turn, site, kept, calls, technique)
        trim()  # what the runs left lies between what is still used: here the most memory is taken
        maps = {path: block.module.get_submodule(path) for path in site}
        made = technique.compress(block, maps, seen)  # type: ignore[arg-type]
        del seen, maps
        _put(model, turn, technique, made)
        for path, one in made.items():
            name = f"{block.name}.{path}"
            new |= {f"{name}:{tensor}": value for tensor, value in one.tensors.items()}
            rows.append({"layer": name, "block": block.index, **one.row})
    for batch, run, kwargs in calls:
        with run:
            y_NTH = called(block, batch, kwargs)
        batch.copy_(y_NTH)
    check_finite(block.name, z_NTH)
    return new, rows


def _put(model: PreTrainedModel, turn: Turn, technique: Technique, made: Mapping[str, Compressed]) -> None:
    """Put a site's new tensors in their places."""
    for path, one in made.items():
        technique.apply(model, f"{turn.block.name}.{path}", one.tensors)
        if hold := getattr(turn.block.module.get_submodule(path), "hold", None):
            hold()  # until the tensors are read back from the file


def _dense(turn: Turn, found: list[list[str]], x_NTH: Tensor, kept: _Kept) -> None:
    """Run the dense block and the gap after it; inputs are kept as bfloat16, what is added to as it is."""
    block, beside = turn.block, turn.beside
    theirs = beside.calls(turn.kwargs, 0, len(x_NTH))
    for call, (batch, kwargs) in enumerate(zip(x_NTH.split(AT_ONCE), theirs, strict=True)):
        with listening(block, [site[0] for site in found], kept.added) as heard:
            y_NTH = called(block, batch, kwargs)
        through(turn.gap, y_NTH)
        for site in found:
            x_MI = beside.rows(heard.inputs[site[0]], call, kwargs)
            kept.put(INPUT, site[0], call, x_MI.bfloat16())
        for path in kept.added:
            residual_MO = beside.rows(heard.residual(path, y_NTH), call, kwargs)
            kept.put(RESIDUAL, path, call, residual_MO)
        batch.copy_(y_NTH)
    check_finite(block.name, x_NTH)


def _seen(turn: Turn, site: list[str], kept: _Kept, calls: Calls, technique: Technique) -> Seen:
    """Moments of one site, from a run of the compressed block that ends there."""
    block, beside, first = turn.block, turn.beside, site[0]
    adding = {path: kept.added[path] for path in site if path in kept.added}
    width = int(block.module.get_submodule(first).in_features)  # type: ignore[arg-type]
    halves = tuple(Moments(torch.zeros(width, width), torch.zeros(width, width)) for _ in range(2))
    read = partial(technique.read, f"{block.name}.{first}")
    sources = SourceSums(technique.sources(block, site) if isinstance(technique, OnWeights) else ())
    tokens = 0
    for call, (batch, run, kwargs) in enumerate(calls):
        y_NTH = None
        with run, listening(block, [first], adding, stop=True, reached=run.mark) as heard:
            try:
                y_NTH = called(block, batch, kwargs)
            except Reached:
                pass
        z_MI = read(beside.rows(heard.inputs[first], call, kwargs).float())
        x_MI, tokens = kept.take(INPUT, first, call), tokens + len(z_MI)
        sums = {path: beside.rows(heard.residual(path, y_NTH), call, kwargs) for path in adding}
        gaps = {path: kept.take(RESIDUAL, path, call) - s_MO for path, s_MO in sums.items()}
        middle, places_M = len(z_MI) // 2, beside.places(heard.inputs[first], call, kwargs)
        for half, rows in zip(halves, (slice(0, middle), slice(middle, None)), strict=True):
            gram_II = sources.add(call * AT_ONCE, places_M[rows], z_MI[rows])
            half.add(x_MI[rows], z_MI[rows], {path: gap_MO[rows] for path, gap_MO in gaps.items()}, gram_II)
    return replace(whole(f"{block.name}.{first}", halves[0], halves[1], tokens), sources=sources.means())
