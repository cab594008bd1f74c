"""What linear maps read while a model reads text: extremes, mean squares and a sample of rows.

Shapes: N windows or rows, T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import decoder
from stages.runtime.contract import StageError


@dataclass(frozen=True)
class Observed:
    """The inputs of one map over a calibration text.

    Attributes:
        peak_I: largest absolute value of each channel, over every token.
        mean_square_I: mean square of each channel, over every token.
        sample_NI: rows at even distances, and of each window the row that holds its largest value.
    """

    peak_I: Tensor
    mean_square_I: Tensor
    sample_NI: Tensor


@dataclass
class _Running:
    peak_I: Tensor | None = None
    square_I: Tensor | None = None
    tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)


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
        maps: name -> modules observed together: the places of one tensor.
        ids_NT: token windows.
        rows: about how many rows of each map's inputs to keep.
        advanced: told the number of windows done.

    Returns:
        name -> its inputs.

    Raises:
        StageError: a map reads a NaN or an infinity, or nothing at all.
    """
    every = max(1, ids_NT.numel() // rows)
    running = {name: _Running() for name in maps}
    last: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]] = []
    handles = [
        module.register_forward_pre_hook(_watch(name, running[name], every, last))
        for name, modules in maps.items()
        for module in modules
    ]
    try:
        for done, ids_1T in enumerate(ids_NT.split(1), start=1):
            decoder(model)(input_ids=ids_1T, use_cache=False)
            last.clear()
            advanced(done)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _finished(name, found) for name, found in running.items()}


def _watch(
    name: str, into: _Running, every: int, last: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # q, k and v read one tensor: it is measured once and its rows are kept once.
        if not last or last[0][0] is not args[0]:
            last[:] = [(args[0], _measured(name, args[0].flatten(0, -2), every))]
        peak_I, square_I, rows_NI = last[0][1]
        into.peak_I = peak_I if into.peak_I is None else torch.maximum(into.peak_I, peak_I)
        into.square_I = square_I if into.square_I is None else into.square_I + square_I
        into.tokens += args[0].shape[:-1].numel()
        into.rows.append(rows_NI)

    return hook


def _measured(name: str, x_TI: Tensor, every: int) -> tuple[Tensor, Tensor, Tensor]:
    peak_I = x_TI.abs().amax(0)
    if not torch.isfinite(peak_I).all():
        raise StageError(
            f"the input of {name} holds a NaN or an infinity on the calibration text",
            measured=f"{int((~torch.isfinite(peak_I)).sum())} of {len(peak_I)} channels",
            limit="finite values",
            remedy="Look at the checkpoint it came from: `enginery diagnose` names the step.",
        )
    kept = torch.cat([torch.arange(0, len(x_TI), every), x_TI.abs().amax(1).argmax().view(1)]).unique()
    return peak_I, x_TI.square().sum(0), x_TI[kept].clone()


def _finished(name: str, found: _Running) -> Observed:
    if found.peak_I is None or found.square_I is None:
        raise StageError(f"{name} read nothing on the calibration text: it takes no part in the model's answer")
    return Observed(found.peak_I, found.square_I / found.tokens, torch.cat(found.rows))
