"""What a block does, found by running it: which maps read one tensor, and what a map's output is added to.

Shapes: N windows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.anatomy.blocks import Block
from stages.runtime.contract import StageError

OUTPUT = ""
"""The block's output, in the place of a norm's path."""


class Reached(Exception):
    """Ends a block's run once everything that is listened to was heard."""


@dataclass
class Heard:
    """What one run of a block let hear.

    Attributes:
        added: path of a map -> path of the norm whose input is a sum with the map's output, or OUTPUT.
        inputs: path of a map -> what it read.
        outputs: path of an adding map -> what it gave.
        sums: path of a norm -> what it read.
    """

    added: Mapping[str, str]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def residual(self, path: str, y_NTH: Tensor | None) -> Tensor:
        """What the output of the map is added to, float32."""
        where = self.added[path]
        total = y_NTH if where == OUTPUT else self.sums[where]
        assert total is not None
        return total.float() - self.outputs[path].float().reshape(total.shape)


def float_maps(block: Block) -> dict[str, nn.Linear]:
    """The float linear maps of a block by their path in it."""
    return {path: one for path, one in block.module.named_modules() if isinstance(one, nn.Linear)}


def sites(block: Block, x_1TH: Tensor, kwargs: Mapping[str, Any], *, idle: bool = False) -> list[list[str]]:
    """Paths of the maps that read one tensor, in the order in which they run.

    Of a map that runs several times in a block its first run counts: DeBERTa's read the tokens, then the distances.

    Raises:
        StageError: a map does not run, and none may be `idle`.
    """
    found = float_maps(block)
    read: list[tuple[str, Tensor]] = []  # kept, since a freed tensor's address would be used again
    with _hooked([(one, _noting(read, path)) for path, one in found.items()]):
        _call(block, x_1TH, kwargs)
    order: dict[tuple[object, ...], list[str]] = {}
    first: dict[str, Tensor] = {}
    for path, x in read:
        first.setdefault(path, x)
    for path, x in first.items():
        order.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(path)
    silent = sorted(found.keys() - {path for path, _ in read})
    if silent and not idle:
        raise StageError(f"{block.name}.{silent[0]} read nothing: it takes no part in the model's answer")
    return list(order.values())


def added_to(block: Block, paths: Iterable[str], x_1TH: Tensor, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """For each map whose output is added to something as it is: the norm that reads the sum, or OUTPUT.

    Each map's output is shifted in a run of its own; where a tensor shifts by just as much, the map is a summand.
    """
    plain = _sums(block, x_1TH, kwargs)
    added: dict[str, str] = {}
    for path in paths:
        module = block.module.get_submodule(path)
        if module.out_features != x_1TH.shape[-1]:
            continue
        shift_H = torch.linspace(-1, 1, x_1TH.shape[-1]) * x_1TH.square().mean().sqrt()
        with _hooked([(module, lambda _m, _a, out, by=shift_H: out + by)], before=False):
            shifted = _sums(block, x_1TH, kwargs)
        for where, before in plain.items():
            if torch.allclose(shifted[where] - before, shift_H.expand_as(before), atol=float(shift_H.max()) * 1e-2):
                added[path] = where
                break
    return added


@contextmanager
def listening(
    block: Block,
    inputs: Sequence[str],
    added: Mapping[str, str],
    *,
    stop: bool = False,
    reached: Callable[[], None] = lambda: None,
) -> Iterator[Heard]:
    """Hear inputs of some maps, outputs of those in `added`, and the sums, during the calls in the context.

    `reached` is called when one of the inputs is. With `stop`, the call ends by `Reached` as soon as all was heard.
    """
    heard = Heard(added)
    norms = {where for where in added.values() if where != OUTPUT}
    wanted = len(inputs) + len(added) + len(norms) + (OUTPUT in added.values())

    def put(into: dict[str, Tensor], path: str, value: Tensor) -> None:
        into.setdefault(path, value)
        if stop and len(heard.inputs) + len(heard.outputs) + len(heard.sums) == wanted:
            raise Reached

    def hear(path: str, value: Tensor) -> None:
        if path not in heard.inputs:
            reached()
        put(heard.inputs, path, value)

    def at(path: str) -> nn.Module:
        return block.module.get_submodule(path)

    before = [(at(path), lambda _m, args, p=path: hear(p, args[0])) for path in inputs]
    before += [(at(path), lambda _m, args, p=path: put(heard.sums, p, args[0])) for path in norms]
    after = [(at(path), lambda _m, _a, out, p=path: put(heard.outputs, p, out)) for path in added]
    with _hooked(before), _hooked(after, before=False):
        yield heard


def _sums(block: Block, x_1TH: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of the norms and the block's output: where sums can be heard."""
    norms = [
        (path, one)
        for path, one in block.module.named_modules()
        if isinstance(weight := getattr(one, "weight", None), Tensor) and weight.ndim == 1
    ]
    read: list[tuple[str, Tensor]] = []
    with _hooked([(one, _noting(read, path)) for path, one in norms]):
        y_1TH = _call(block, x_1TH, kwargs)
    width = y_1TH.shape[-1]
    whole = {path: x.reshape(y_1TH.shape) for path, x in read if x.numel() == y_1TH.numel() and x.shape[-1] == width}
    return whole | {OUTPUT: y_1TH}


def _noting(into: list[tuple[str, Tensor]], path: str) -> Callable[..., None]:
    return lambda _module, args: into.append((path, args[0]))


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]], *, before: bool = True) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        for module, hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(block: Block, x_NTH: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        returned = block.module(x_NTH, **kwargs)
    y_NTH: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return y_NTH
