"""Run a decoder block by block over calibration windows, so that statistics of one block at a time suffice.

Shapes: N windows, T tokens, H hidden, I inputs and O outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.algorithms.products import SHORT
from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.block_calls import PROBE, arguments, embedded, stacks
from stages.models.blockwise.drawn_labels import drawn_gradient
from stages.models.memory.lean_import import without_compiler
from stages.models.memory.pages import release
from stages.runtime.contract import StageError

_UNSEEN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model raises that computes something without memory that cannot be."""


def check_order(model: PreTrainedModel) -> None:
    """Raise StageError where blocks read something else than windows, as far as a model on the meta device tells."""
    first = stacks(model)[0]
    with suppress(*_UNSEEN), without_compiler():  # without a cache masks are made of positions, which are not there
        embedded(replace(first, plain=dict.fromkeys(first.plain, True)), torch.zeros(1, PROBE, dtype=torch.int64))


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


def worth(model: PreTrainedModel, ids_NT: Tensor) -> dict[str, float]:
    """Path of each map that runs -> nats a token that are lost if its outputs are wrong by as much as they are large.

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

        def see(inner: str, y: Tensor, g: Tensor, block: Block = block) -> None:
            size_T = y.flatten(0, -2).float().square().sum(1)
            path = f"{block.name}.{inner}"
            nats[path] = nats.get(path, 0.0) + float(g.float().square().mean() * size_T.median()) / 2 / len(ids_NT)

        g_NTH = _graded(block, inputs.pop(), g_NTH, kwargs, see)
        release(block.module)
    return nats


def _graded(
    block: Block,
    x_NTH: Tensor,
    g_NTH: Tensor,
    kwargs: Mapping[str, Any],
    see: Callable[[str, Tensor, Tensor], None],
) -> Tensor:
    """Call see(map, output, gradient) for each window, and return the gradient at the block's input."""
    maps, outgoing = anatomy.linear_maps(block), []
    for x_TH, g_TH in zip(x_NTH, g_NTH, strict=True):
        outputs: dict[str, Tensor] = {}
        x_1TH = x_TH[None].detach().requires_grad_()
        with watched(maps, partial(_keep, outputs)), in_short():
            y_1TH = output(block.module(x_1TH, **kwargs)).float()
        g_1TH, *g_outputs = torch.autograd.grad(y_1TH, [x_1TH, *outputs.values()], g_TH[None], allow_unused=True)
        outgoing.append(g_1TH[0])
        for (path, y), g in zip(outputs.items(), g_outputs, strict=True):
            if g is not None:
                see(path, y.detach(), g)
    return torch.stack(outgoing)


def _keep(outputs: dict[str, Tensor], path: str, _x: Tensor, y: Tensor) -> None:
    # DeBERTa's maps read the tokens, then distances, which hang on no token.
    if y.requires_grad:
        outputs.setdefault(path, y)


def output(returned: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return returned[0] if isinstance(returned, tuple) else returned
