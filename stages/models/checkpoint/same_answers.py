"""Whether a written checkpoint answers as the model that it was written from: a tie, a size or a field may be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import classes
from stages.models.anatomy.plainness import ask
from stages.models.layers import rounded_cache
from stages.models.layers.quantized_linear import QuantizedLinear
from stages.models.memory.pages import forget, pieces
from stages.runtime.contract import Progress, StageError

SLACK = 1e-3
"""Of the largest value: far above what another order of sums changes, far below what a lost tie does."""
ROUNDED = 0.1
"""The same where activations are rounded: the least difference may take one over a step."""
_DEFECT = "This is a defect: please report it with the recipe."
_SHORT = (torch.bfloat16, torch.float16)


@torch.no_grad()
def check(
    model: PreTrainedModel,
    written: PreTrainedModel,
    types: Mapping[str, torch.dtype],
    progress: Progress,
    original: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Ask both models the same; see `plainness.ask`.

    Each weight is read once, and its pages are given back.

    Args:
        model: the one in memory, in eval mode.
        written: the one that was written, as it is stored.
        types: name -> type in which a tensor was written, where that is not its own.
        progress: told if the architecture wants more than tokens.
        original: opens the model that this one was made of, as it is stored; asked where an answer is no number.

    Raises:
        StageError: they differ, or answer what is no number where the original gave one.
    """
    expected = _asked(model, types, progress)
    found, slack = _answers(written, {}) if expected else {}, ROUNDED if _rounds(model) else SLACK
    for name, one in expected.items():
        missed = _missed(one, found.get(name))
        if not missed <= slack:
            raise StageError(
                f"the written checkpoint does not answer as the model that was to be written: its {name} differ",
                measured=f"{missed:.3g} of the largest value",
                limit=slack,
                remedy=_DEFECT,
            )
    if original and any(not one.isfinite().all() for one in expected.values()):
        _refuse_lost(expected, _answers(original(), {}))


def _refuse_lost(expected: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Raise StageError where a model answers a NaN or an infinity, and what it was made of a number."""
    for name, one in expected.items():
        numbers = before[name].isfinite()
        # States may have become narrower: all of them count then.
        lost = ~one.isfinite() & (numbers if numbers.shape == one.shape else numbers.all())
        if lost.any():
            raise StageError(
                f"the {name} of the checkpoint hold a NaN or an infinity where those of the one it was made of do not",
                measured=f"{int(lost.sum())} of {lost.numel()} values",
                limit=0,
                remedy="Ask for less in this step: keep more, or more bits.",
            )


@torch.no_grad()
def speaks(written: PreTrainedModel, progress: Progress) -> None:
    """Ask a written model that no model in memory stands beside: what it answers must be numbers.

    Raises:
        StageError: they are not finite.
    """
    for name, one in _asked(written, {}, progress).items():
        if not one.isfinite().all():
            raise StageError(f"the {name} of the written checkpoint hold a NaN or an infinity", remedy=_DEFECT)


def _missed(one: Tensor, other: Tensor | None) -> float:
    if other is None or one.shape != other.shape:
        return float("inf")
    mine, theirs, odd = one.double(), other.double(), ~one.isfinite()
    # A NaN beside a number, or another infinity, is no small difference.
    alike = torch.equal(odd, ~theirs.isfinite()) and torch.equal(mine[odd].nan_to_num(), theirs[odd].nan_to_num())
    if not alike or odd.all():
        return 0.0 if alike else float("inf")
    return float((mine - theirs)[~odd].abs().max() / mine[~odd].abs().max().clamp_min(1e-30))


def _rounds(model: nn.Module) -> bool:
    inputs = any(isinstance(one, QuantizedLinear) and one.input_form is not None for one in model.modules())
    return inputs or bool(rounded_cache.modules(model))


def _asked(model: PreTrainedModel, types: Mapping[str, torch.dtype], progress: Progress) -> dict[str, Tensor]:
    try:
        return _answers(model, types)
    except Exception as error:
        if not _wants_more(model, error):
            raise
        progress.note(f"{type(model).__name__} cannot be asked by tokens alone: {type(error).__name__}: {error}")
        return {}


def _wants_more(model: PreTrainedModel, error: Exception) -> bool:
    """Whether it is the architecture that wants more than tokens: as its library makes it, it says the same to them."""
    bare = classes.outline(type(model), model.config).eval()
    try:
        with torch.device("meta"):
            ask(bare)
    # Any error: it is compared.
    except Exception as other:  # noqa: BLE001
        return (type(other), str(other)) == (type(error), str(error))
    return False


def _answers(model: PreTrainedModel, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    with _widened(model, types):
        return ask(model)


@contextmanager
def _widened(model: PreTrainedModel, types: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Within it, the model computes in float32 with what is stored of it in 16 bits, no more than a block at a time."""
    kinds = {id(tensor): types[names[0]] for names, tensor in anatomy.distinct_tensors(model) if names[0] in types}
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def widen(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            kind = kinds.get(id(tensor), tensor.dtype)
            if kind in _SHORT and id(tensor) not in held:
                held[id(tensor)] = tensor, tensor.data
                tensor.data = _wide(tensor.data, kind)

    def restore(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in held:
                tensor.data = held.pop(id(tensor))[1]
            forget(tensor)

    def enter(tensors: list[Tensor], *_: Any) -> None:
        widen(tensors)

    def leave(tensors: list[Tensor], *_: Any) -> None:
        restore(tensors)

    inside: set[int] = set()
    with ExitStack() as undo:
        undo.callback(lambda: restore([tensor for tensor, _ in held.values()]))
        for block in anatomy.blocks(model):
            own = [tensor for _, tensor in anatomy.distinct_tensors(block.module)]
            inside |= {id(one) for one in own}
            undo.callback(block.module.register_forward_pre_hook(partial(enter, own)).remove)
            undo.callback(block.module.register_forward_hook(partial(leave, own)).remove)
        outside = [tensor for _, tensor in anatomy.distinct_tensors(model) if id(tensor) not in inside]
        undo.callback(restore, outside)
        widen(outside)
        yield


def _wide(narrow: Tensor, kind: torch.dtype) -> Tensor:
    """What a type of 16 bits keeps of a tensor, in float32: of a table of tokens, some rows at a time."""
    wide = torch.empty(narrow.shape)
    for to, part in zip(pieces(wide), pieces(narrow), strict=True):
        to.copy_(part.to(kind))
    return wide
