"""One pass over a model's blocks, the dense block beside the compressed one: each map is fitted to what it should give.

A compressed model's error grows from block to block because every map still answers the inputs of the dense model. Here
each map is compressed towards W* instead: the map that comes closest to the dense outputs on the inputs that the blocks
before it, compressed already, really give. For a map whose output is added to the residual stream, W* also makes up for
what that stream has drifted. The moments of one site at a time suffice; no gradient is needed.

Shapes: N windows, T tokens, M tokens at once, H hidden, I inputs and O outputs of a map.

Source: least squares on the inputs of both models, as in GPTAQ (Li et al. 2025) and QEP (Arai and Ichikawa 2025); the
drift of the residual stream is added here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.correction import DAMPING, STRENGTH, agreement, corrected, inverse_root
from stages.algorithms.products import product
from stages.models import anatomy
from stages.models.anatomy import Block
from stages.models.mapped import forget, release, trim
from stages.models.probing import Reached, added_to, listening, sites
from stages.models.replaying import Replay
from stages.models.resuming import read_record, save_state
from stages.models.streaming import PROBE, arguments, check_finite, embedded, in_short

AT_ONCE = 2
"""Windows in one call of a block: weights are turned to bfloat16 once a call."""
SAVE_EVERY_S = 5.0
"""Both streams of a text are large beside a small model's block: they are written after the block that ends next."""


@dataclass
class Moments:
    """What the maps of one site read over a part of the calibration text, as sums over its tokens.

    Attributes:
        moment_II: z z^T of the compressed model's inputs.
        drift_II: (x - z) z^T, the dense model's inputs less the compressed one's.
        residual_OI: by path, (r - s) z^T for a map whose output is added to the stream: r what the dense model adds
            it to, s what the compressed one does.
    """

    moment_II: Tensor
    drift_II: Tensor
    residual_OI: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Seen(Moments):
    """The whole text, the sums divided by its tokens.

    Attributes:
        half: sums over the first half of every few windows' tokens.
        tokens: of the whole text.
        damping: of a fit, a share of the mean squared input.
    """

    half: Moments | None = None
    tokens: int = 0
    damping: float = DAMPING

    def target(self, path: str, w_OI: Tensor) -> Tensor:
        """W*, float32: the map to compress instead of `w_OI`."""
        return self.targets({path: w_OI})[path]

    def targets(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for several maps of the site at once, which takes less time."""
        w_OI, sizes = torch.cat(list(maps.values())).float(), [len(one) for one in maps.values()]
        strength = STRENGTH
        if self.half is not None:
            parts = (self.half, self._rest(self.half))
            residuals = [_stacked(part, maps) for part in parts]
            strength = agreement(
                w_OI, [p.moment_II for p in parts], [p.drift_II for p in parts], residuals, self.damping
            )
            del parts, residuals
        new_OI = corrected(w_OI, self.root_II, self.drift_II, _stacked(self, maps), strength=strength)
        return dict(zip(maps, new_OI.split(sizes), strict=True))

    def _rest(self, half: Moments) -> Moments:
        """The other half's sums: not kept, since moments of wide maps are the most that a pass holds."""
        residual = {path: self.residual_OI[path] * self.tokens - sum_OI for path, sum_OI in half.residual_OI.items()}
        return Moments(
            (self.moment_II * self.tokens).sub_(half.moment_II),
            (self.drift_II * self.tokens).sub_(half.drift_II),
            residual,
        )

    @cached_property
    def root_II(self) -> Tensor:
        """Of the damped moment's inverse, upper, float32."""
        return inverse_root(self.moment_II, self.damping)


def _stacked(part: Moments, maps: Mapping[str, Tensor]) -> Tensor | None:
    if not part.residual_OI.keys() & maps.keys():
        return None
    none = {path: torch.zeros(len(w_OI), w_OI.shape[1]) for path, w_OI in maps.items()}
    return torch.cat([part.residual_OI.get(path, none[path]) for path in maps])


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
    blocks, calls = anatomy.blocks(model), arguments(model, ids_NT.shape[1])
    short = arguments(model, min(PROBE, ids_NT.shape[1]))
    done, rows, streams = _resumed(model, technique, state)
    if done:
        note(f"goes on after block {done} of {len(blocks)}, saved before it was cut off")
    x_NTH, z_NTH = streams or _entering(model, ids_NT, ends)
    if not done:
        _through(_gap(blocks, calls, 0, gone), x_NTH)
    saved = time.monotonic()
    for block, kwargs, probe in list(zip(blocks, calls, short, strict=True))[done:]:
        if block.index in gone:
            advanced(block.index + 1, len(blocks))
            continue
        began, dense = time.monotonic(), list(block.module.parameters())
        technique.enter(block)
        gap = _gap(blocks, calls, block.index + 1, gone)
        new, of_block = _block(model, block, (kwargs, probe), (x_NTH, z_NTH), technique, gap)
        rows += of_block
        save_state(state / _file(block.index), new, {"rows": of_block})
        _apply(model, technique, state / _file(block.index))
        release(block.module)
        for tensor in dense:
            forget(tensor)
        del dense
        trim()
        if time.monotonic() - saved >= SAVE_EVERY_S:
            _save_streams(state, block.index, x_NTH, z_NTH)
            saved = time.monotonic()
        timed("block_seconds", time.monotonic() - began, block.index)
        advanced(block.index + 1, len(blocks))
    ends.leave(x_NTH, z_NTH)
    return rows


def _entering(model: PreTrainedModel, ids_NT: Tensor, ends: Ends) -> tuple[Tensor, Tensor]:
    x_NTH = embedded(model, ids_NT)
    return x_NTH, ends.enter(x_NTH)


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


@dataclass
class _Kept:
    """What the dense block gave, batch by batch: inputs of each site, and what outputs are added to."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    residuals: dict[str, list[Tensor]] = field(default_factory=dict)

    def drop(self, site: Sequence[str]) -> None:
        """Forget what was kept for a site."""
        self.inputs.pop(site[0])
        for path in site:
            self.residuals.pop(path, None)


def _block(
    model: PreTrainedModel,
    block: Block,
    calls: tuple[Mapping[str, Any], Mapping[str, Any]],
    streams: tuple[Tensor, Tensor],
    technique: Technique,
    gap: Gap,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """New tensors and rows of one block; both streams are what comes out of it afterwards.

    `calls` are its arguments for a window, and for the first few tokens of one; `gap` the dense blocks after it that
    are gone.
    """
    (x_NTH, z_NTH), (kwargs, probe) = streams, calls
    few_1TH = x_NTH[:1, :PROBE]
    found = sites(block, few_1TH, probe)
    added = added_to(block, [path for site in found for path in site], few_1TH, probe)
    kept = _Kept()
    _dense(block, found, added, x_NTH, kwargs, kept, gap)
    new: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    runs = [Replay() for _ in z_NTH.split(AT_ONCE)]
    for site in found:
        maps = {path: block.module.get_submodule(path) for path in site}
        technique.begin([f"{block.name}.{path}" for path in site], _peak(kept.inputs[site[0]]))
        reads = partial(technique.read, f"{block.name}.{site[0]}")
        seen = _seen(block, site, added, kept, z_NTH, kwargs, reads, runs)
        kept.drop(site)
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
    for batch, run in zip(z_NTH.split(AT_ONCE), runs, strict=True):
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
    kwargs: Mapping[str, Any],
    kept: _Kept,
    gap: Gap,
) -> None:
    """Run the dense block and the gap after it; inputs are kept as bfloat16, what is added to as it is."""
    for batch in x_NTH.split(AT_ONCE):
        with listening(block, [site[0] for site in found], added) as heard:
            y_NTH = _call(block, batch, kwargs)
        _through(gap, y_NTH)
        for site in found:
            kept.inputs.setdefault(site[0], []).append(heard.inputs[site[0]].bfloat16())
        for path in added:
            residual = heard.residual(path, y_NTH)
            kept.residuals.setdefault(path, []).append(residual)
        batch.copy_(y_NTH)
    _finite(block.name, x_NTH)


def _seen(
    block: Block,
    site: list[str],
    added: Mapping[str, str],
    kept: _Kept,
    z_NTH: Tensor,
    kwargs: Mapping[str, Any],
    read: Callable[[Tensor], Tensor],
    runs: Sequence[Replay],
) -> Seen:
    """Moments of one site, from a run of the compressed block that ends there."""
    adding = {path: added[path] for path in site if path in added}
    first = site[0]
    width = int(block.module.get_submodule(first).in_features)  # type: ignore[arg-type]
    halves = tuple(Moments(torch.zeros(width, width), torch.zeros(width, width)) for _ in range(2))
    for index, (batch, run) in enumerate(zip(z_NTH.split(AT_ONCE), runs, strict=True)):
        y_NTH = None
        with run, listening(block, [first], adding, stop=True, reached=run.mark) as heard:
            try:
                y_NTH = _call(block, batch, kwargs)
            except Reached:
                pass
        z_MI = read(heard.inputs[first].flatten(0, -2).float())
        x_MI = kept.inputs[first][index].flatten(0, -2)
        gaps = {path: (kept.residuals[path][index] - heard.residual(path, y_NTH)).flatten(0, -2) for path in adding}
        middle = len(z_MI) // 2
        for half, rows in zip(halves, (slice(0, middle), slice(middle, None)), strict=True):
            _add(half, x_MI[rows], z_MI[rows], {path: gap_MO[rows] for path, gap_MO in gaps.items()})
    return _whole(f"{block.name}.{first}", halves[0], halves[1], z_NTH.shape[0] * z_NTH.shape[1])


def _add(half: Moments, x_MI: Tensor, z_MI: Tensor, gaps: Mapping[str, Tensor]) -> None:
    half.moment_II += product(z_MI.T, z_MI)
    # The drift is small beside the inputs: eight bits of mantissa are enough for it, and twice as fast.
    short_MI = z_MI.bfloat16()
    half.drift_II += (x_MI.float() - z_MI).bfloat16().T @ short_MI
    for path, gap_MO in gaps.items():
        sum_OI = (gap_MO.bfloat16().T @ short_MI).float()
        half.residual_OI[path] = half.residual_OI[path] + sum_OI if path in half.residual_OI else sum_OI


def _whole(name: str, one: Moments, other: Moments, tokens: int) -> Seen:
    """The text from its halves; what `other` holds is used up."""
    residual = {path: other.residual_OI[path].add_(sum_OI).div_(tokens) for path, sum_OI in one.residual_OI.items()}
    moment_II = other.moment_II.add_(one.moment_II).div_(tokens)
    drift_II = other.drift_II.add_(one.drift_II).div_(tokens)
    seen = Seen(moment_II, drift_II, residual, one, tokens)
    for moment in (seen.moment_II, seen.drift_II, *residual.values()):
        _finite(name, moment)
    return seen


def _peak(inputs: Sequence[Tensor]) -> float:
    return max(float(x.abs().max()) for x in inputs)


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
