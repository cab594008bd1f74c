"""Run a decoder block by block over calibration windows, so that statistics of one block at a time suffice.

Shapes: N windows, T tokens, H hidden, I inputs and O outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.products import SHORT, gram
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import arguments, embedded
from stages.models.blockwise.drawn_labels import drawn_gradient
from stages.models.memory.pages import release
from stages.models.memory.spill import Shelf
from stages.runtime.contract import StageError

SITES = {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}
"""Which input each projection reads."""


@dataclass
class Statistics:
    """What calibration saw of one block, as means over tokens.

    Attributes:
        moments: site -> E[x x^T], [I, I].
        gradients: role -> E[g^2] of the log-likelihood's gradient at each output, [O]: the diagonal of the Fisher
            information, since labels are drawn from the model's own predictions.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


INPUT = "input"
"""Beside the names of sites: what a block reads."""


def run(block: Block, x_NTH: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The block's output, window by window, its products in a short float.

    Raises:
        StageError: an activation is not finite.
    """
    with torch.no_grad(), in_short():
        y_NTH = torch.cat([output(block.module(x_1TH, **kwargs)).float() for x_1TH in x_NTH.split(1)])
    check_finite(block.name, y_NTH)
    return y_NTH


def in_short() -> torch.autocast:
    """Products in a short float: statistics of a text vary more from passage to passage than this changes them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=SHORT is torch.bfloat16)


def check_finite(name: str, x: Tensor) -> None:
    """Raise StageError naming the module whose activations hold a NaN or an infinity."""
    if not x.isfinite().all():
        raise StageError(
            f"the activations after {name} hold a NaN or an infinity",
            measured=f"{int((~x.isfinite()).sum())} of {x.numel()} values",
            remedy="Check the checkpoint with `enginery inspect`; a model that overflows cannot be calibrated.",
        )


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call see(name, input, output) whenever one of the modules runs."""
    hooks = [
        module.register_forward_hook(lambda _m, args, out, name=name: see(name, args[0], out))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sensitivities(
    model: PreTrainedModel,
    ids_NT: Tensor,
    roles: Sequence[str],
    folder: Path,
    advanced: Callable[[float, float], None],
) -> Iterator[tuple[Block, Statistics]]:
    """Each block with its statistics, from the last block to the first.

    One forward sweep over all windows takes the moments. A backward sweep over the first half of them computes each
    block again with gradients, so that no more than one block's graph is alive; the gradients' mean squares settle
    with fewer tokens than the moments.

    Args:
        model: its parameters' gradients are not needed and are turned off.
        ids_NT: calibration windows.
        roles: the projections asked for.
        folder: where each block's inputs and moments wait for the backward sweep.
        advanced: told (done, total) in block passes.

    Raises:
        StageError: an activation is not finite.
    """
    model.requires_grad_(False)
    blocks, calls = anatomy.blocks(model), arguments(model, ids_NT.shape[1])
    graded = -(-len(ids_NT) // 2)
    waiting, x_NTH = Shelf(folder), embedded(model, ids_NT)
    total = 3 * len(blocks)  # the gradients of half the windows take about two forward passes of all
    for block, kwargs in zip(blocks, calls, strict=True):
        first_NTH = x_NTH[:graded]
        x_NTH, moments = _forward(block, x_NTH, kwargs, roles)
        waiting.put(block.index, {INPUT: first_NTH, **moments})
        del first_NTH, moments
        release(block.module)
        advanced(block.index + 1, total)
    g_NTH = drawn_gradient(model, ids_NT[:graded], x_NTH[:graded])
    for block, kwargs in zip(reversed(blocks), reversed(calls), strict=True):
        kept = waiting.take(block.index)
        gradients, g_NTH = _backward(block, kept.pop(INPUT), g_NTH, kwargs, roles)
        statistics = Statistics(kept, gradients)
        advanced(total - 2 * block.index, total)
        yield block, statistics
        release(block.module)


def _forward(
    block: Block, x_NTH: Tensor, kwargs: Mapping[str, Any], roles: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    maps, moments = anatomy.projections(block), dict[str, Tensor]()
    one_a_site = {SITES[role]: maps[role] for role in roles}

    def see(site: str, x: Tensor, _y: Tensor) -> None:
        x_TI = x.detach().flatten(0, -2).float()
        with torch.autocast("cpu", enabled=False):
            _add(moments, site, gram(x_TI) / (x_NTH.shape[0] * x_NTH.shape[1]))

    with watched(one_a_site, see):
        y_NTH = run(block, x_NTH, kwargs)
    return y_NTH, moments


def worth(model: PreTrainedModel, ids_NT: Tensor) -> dict[str, float]:
    """Path of each projection -> nats a token that are lost if its outputs are wrong by as much as they are large.

    To second order, half the mean square of the gradient times that of the output of a usual token: a few tokens whose
    outputs are huge do not count for more than the others.

    Args:
        model: a float model; its parameters' gradients are turned off.
        ids_NT: windows; one is enough.
    """
    model.requires_grad_(False)
    blocks, calls, x_NTH = anatomy.blocks(model), arguments(model, ids_NT.shape[1]), embedded(model, ids_NT)
    inputs, nats = list[Tensor](), dict[str, float]()
    for block, kwargs in zip(blocks, calls, strict=True):
        inputs.append(x_NTH)
        x_NTH = run(block, x_NTH, kwargs)
        release(block.module)
    g_NTH = drawn_gradient(model, ids_NT, x_NTH)
    for block, kwargs in zip(reversed(blocks), reversed(calls), strict=True):

        def see(role: str, y: Tensor, g: Tensor, block: Block = block) -> None:
            size_T = y.flatten(0, -2).float().square().sum(1)
            path = f"{block.name}.{anatomy.path(role, block)}"
            nats[path] = nats.get(path, 0.0) + float(g.float().square().mean() * size_T.median()) / 2 / len(ids_NT)

        g_NTH = _graded(block, inputs.pop(), g_NTH, kwargs, list(anatomy.projections(block)), see)
        release(block.module)
    return nats


def _backward(
    block: Block, x_NTH: Tensor, g_NTH: Tensor, kwargs: Mapping[str, Any], roles: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Mean squares of the gradients at the projections' outputs, and the gradient at the block's input."""
    squares: dict[str, Tensor] = {}
    tokens = x_NTH.shape[0] * x_NTH.shape[1]

    def see(role: str, _y: Tensor, g: Tensor) -> None:
        _add(squares, role, g.float().square().sum((0, 1)) / tokens)

    return squares, _graded(block, x_NTH, g_NTH, kwargs, roles, see)


def _graded(
    block: Block,
    x_NTH: Tensor,
    g_NTH: Tensor,
    kwargs: Mapping[str, Any],
    roles: Sequence[str],
    see: Callable[[str, Tensor, Tensor], None],
) -> Tensor:
    """Call see(role, output, gradient) for each window, and return the gradient at the block's input."""
    maps = {role: one for role, one in anatomy.projections(block).items() if role in roles}
    outgoing = []
    for x_TH, g_TH in zip(x_NTH, g_NTH, strict=True):
        outputs: dict[str, Tensor] = {}
        x_1TH = x_TH[None].detach().requires_grad_()
        with watched(maps, partial(_keep, outputs)), in_short():
            y_1TH = output(block.module(x_1TH, **kwargs)).float()
        asked = [outputs[role] for role in maps]
        g_1TH, *g_outputs = torch.autograd.grad(y_1TH, [x_1TH, *asked], g_TH[None])
        outgoing.append(g_1TH[0])
        for role, y, g in zip(maps, asked, g_outputs, strict=True):
            see(role, y.detach(), g)
    return torch.stack(outgoing)


def _keep(outputs: dict[str, Tensor], role: str, _x: Tensor, y: Tensor) -> None:
    outputs[role] = y


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def output(returned: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return returned[0] if isinstance(returned, tuple) else returned
