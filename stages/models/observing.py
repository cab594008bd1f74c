"""What linear maps read while a model reads text: extremes, mean squares and a sample of rows.

Shapes: N windows or rows, T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.smoothing import Sample
from stages.models.anatomy import decoder
from stages.runtime.contract import StageError

TAILS = 8
"""Rows of each window that pass the peaks seen before by most, kept beside the sampled ones: ranges are about them."""


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


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    maps: Mapping[str, Iterable[nn.Module]],
    ids_NT: Tensor,
    *,
    rows: int,
    advanced: Callable[[int], None] = lambda done: None,
) -> dict[str, Observed]:
    """Run a text through the decoder and keep what each map reads.

    Args:
        model: a float model; the head is not run.
        maps: name -> modules observed together: the maps that read one tensor, at every place where they stand.
        ids_NT: token windows, at least two.
        rows: about how many rows of each map's inputs to keep.
        advanced: told the number of windows done.

    Returns:
        name -> its inputs.

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
    running = {name: _Running(every=max(1, ids_NT[half:].numel() // rows)) for name in maps}
    handles = [
        module.register_forward_pre_hook(_hook(name, running[name])) for name, some in maps.items() for module in some
    ]
    try:
        for done, ids_1T in enumerate(ids_NT.split(1)):
            for one in running.values():
                one.last, one.first_half = None, done < half
            decoder(model)(input_ids=ids_1T, use_cache=False)
            advanced(done + 1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _finished(name, found) for name, found in running.items()}


def _hook(name: str, into: _Running) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # q, k and v read one tensor: it is measured once.
        if args[0] is not into.last:
            into.last = args[0]
            _measure(name, into, args[0].flatten(0, -2))

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


def _finished(name: str, found: _Running) -> Observed:
    if not found.tokens:
        raise StageError(f"{name} read nothing on the calibration text: it takes no part in the model's answer")
    sample = Sample(found.half_peak_I, torch.cat(found.rows), torch.cat(found.weights))
    return Observed(found.peak_I, found.square_I / found.tokens, sample)
