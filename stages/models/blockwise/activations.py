"""What linear maps read while a model reads text: extremes, mean squares and a sample of rows.

Shapes: N windows or rows, T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.smoothing import Sample
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import arguments, embedded, together
from stages.models.blockwise.run import in_short, output
from stages.models.memory.pages import release, trim
from stages.runtime.contract import StageError

Maps = Mapping[str, Iterable[nn.Module]]
AT_ONCE = 4
"""Windows in one call of a block: weights are turned to bfloat16 once a call."""
TAILS = 16
"""Rows of each call that pass the peaks seen before by most, kept beside the sampled ones: ranges are about them."""


@dataclass(frozen=True)
class Observed:
    """The inputs of one map over a calibration text.

    Attributes:
        peak_I: largest absolute value of each channel, over every token.
        mean_square_I: mean square of each channel, over every token.
        sample: the peaks of the first half of the text, and rows of its second half: at even distances and extreme.
    """

    peak_I: Tensor
    mean_square_I: Tensor
    sample: Sample


@dataclass
class _Running:
    every: int
    first_half: bool = True
    last: Tensor | None = None
    peak_I: Tensor = field(default_factory=lambda: torch.zeros(()))
    half_peak_I: Tensor = field(default_factory=lambda: torch.zeros(()))
    square_I: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def observe(model: PreTrainedModel, maps: Maps, ids_NT: Tensor, *, rows: int) -> dict[str, Observed]:
    """All of `observed` at once."""
    return dict(observed(model, maps, ids_NT, rows=rows))


@torch.no_grad()
def observed(model: PreTrainedModel, maps: Maps, ids_NT: Tensor, *, rows: int) -> Iterator[tuple[str, Observed]]:
    """Run a text through the blocks and keep what each map reads, one block's samples at a time.

    Args:
        model: a float model; the head is not run.
        maps: name -> modules observed together: the maps that read one tensor, at every place where they stand.
        ids_NT: token windows, at least two.
        rows: about how many rows of each map's inputs to keep.

    Yields:
        A name and its inputs, as soon as the last block where it stands has run.

    Raises:
        StageError: fewer than two windows, or a map reads a NaN, an infinity, or nothing at all.
    """
    half = len(ids_NT) // 2
    if not half:
        raise StageError(
            "calibration needs one window for ranges and another to judge them",
            measured=f"{len(ids_NT)} window of {ids_NT.shape[1]} tokens",
            limit="2 windows",
            remedy="Give the corpus a larger `calibrate` split, or shorten `window_tokens`.",
        )
    every = max(1, ids_NT[half:].numel() // rows)
    running = {name: _Running(every) for name in maps}
    blocks, calls, x_NTH = anatomy.blocks(model), arguments(model, ids_NT.shape[1]), embedded(model, ids_NT)
    last = {name: max((_block_of(blocks, one) for one in some), default=-1) for name, some in maps.items()}
    if strange := [name for name, index in last.items() if index < 0]:
        raise StageError(f"{strange[0]} read nothing on the calibration text: it takes no part in the model's answer")
    for block, kwargs in zip(blocks, calls, strict=True):
        inside = {id(module) for module in block.module.modules()}
        here = [(name, one) for name, some in maps.items() for one in some if id(one) in inside]
        handles = [one.register_forward_pre_hook(_hook(name, running[name])) for name, one in here]
        try:
            for part_NTH, first_half in ((x_NTH[:half], True), (x_NTH[half:], False)):
                for batch in part_NTH.split(AT_ONCE):
                    for name, _ in here:
                        running[name].last, running[name].first_half = None, first_half
                    with in_short():
                        batch.copy_(output(block.module(batch, **together(kwargs, len(batch)))))
        finally:
            for handle in handles:
                handle.remove()
        release(block.module)
        trim()
        for name in [name for name, index in last.items() if index == block.index]:
            yield name, _finished(running.pop(name))


def _block_of(blocks: Sequence[Block], module: nn.Module) -> int:
    """Index of the last block in which a module stands, -1 for none."""
    return max((block.index for block in blocks if any(one is module for one in block.module.modules())), default=-1)


def _hook(name: str, into: _Running) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # q, k and v read one tensor: it is measured once.
        if args[0] is not into.last:
            into.last = args[0]
            _measure(name, into, args[0].flatten(0, -2).float())

    return note


def _measure(name: str, into: _Running, x_TI: Tensor) -> None:
    size_TI = x_TI.abs()
    peak_I = size_TI.amax(0)
    if not torch.isfinite(peak_I).all():
        raise StageError(
            f"the input of {name} holds a NaN or an infinity on the calibration text",
            measured=f"{int((~torch.isfinite(peak_I)).sum())} of {len(peak_I)} channels",
            limit="finite values",
            remedy="Look at the checkpoint it came from: `enginery diagnose` names the step.",
        )
    into.peak_I = torch.maximum(into.peak_I, peak_I)
    into.square_I = into.square_I + x_TI.square().sum(0)
    into.tokens += len(x_TI)
    if into.first_half:
        into.half_peak_I = into.peak_I
        return
    excess_T = (size_TI / into.half_peak_I.clamp_min(1e-12)).amax(1)
    weight_T = torch.zeros(len(x_TI))
    weight_T[excess_T.topk(min(TAILS, len(x_TI))).indices] = 1.0
    weight_T[:: into.every] = float(into.every)
    into.rows.append(x_TI[weight_T > 0])
    into.weights.append(weight_T[weight_T > 0])


def _finished(found: _Running) -> Observed:
    sample = Sample(found.half_peak_I, torch.cat(found.rows), torch.cat(found.weights))
    return Observed(found.peak_I, found.square_I / found.tokens, sample)
