"""How a model runs its stacks of blocks: what enters them, the arguments of each block, and what leaves.

Shapes: N windows, T tokens, S tokens of an encoder, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy import blocks as anatomy
from stages.models.anatomy import tasks
from stages.models.anatomy.blocks import Block
from stages.models.blockwise.window_order import require_order
from stages.models.memory.pages import release
from stages.runtime.contract import StageError

PROBE = 8
"""Tokens that suffice where only what a block does matters, not what comes out."""
OTHER_WAYS = "Use `prune` with `method: magnitude`, or `quantize` to nearest (`search: off`), which read no text."
READ = object()
"""In a block's arguments: what the stack before gives, see `filled`."""


class Arguments(dict[str, Any]):
    """A block's keyword arguments for one window; those in `each` are longer for several (BLOOM's alibi)."""

    each: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Stack:
    """Blocks in a row.

    Attributes:
        inner: the module that embeds their tokens and holds their last norm.
        blocks: in order.
        after: the stack whose outputs these blocks read as well.
        plain: keyword arguments of `inner` that keep it from caching.
    """

    inner: nn.Module
    blocks: Sequence[Block]
    after: Stack | None
    plain: Mapping[str, Any]

    def run(self, ids_NT: Tensor, read_NSH: Tensor | None = None) -> Tensor:
        """What leaves its last norm, [N, T, H]."""
        read = {} if read_NSH is None else {"encoder_hidden_states": read_NSH}
        out: Tensor = self.inner(input_ids=ids_NT, **read, **self.plain)[0]
        return out


def stacks(model: PreTrainedModel) -> list[Stack]:
    """The model's stack, or its encoder and its decoder.

    Raises:
        StageError: the architecture is not understood.
    """
    blocks = anatomy.blocks(model)
    if not model.config.is_encoder_decoder:
        return [Stack(anatomy.decoder(model), blocks, None, _uncached(model))]
    kinds = {kind: [block for block in blocks if block.stack == kind] for kind in ("encoder", "decoder")}
    if not all(kinds.values()):
        raise StageError(f"the stacks of {type(model).__name__} are not an encoder and a decoder")
    encoder = Stack(model.get_encoder(), kinds["encoder"], None, {})
    return [encoder, Stack(model.get_decoder(), kinds["decoder"], encoder, _uncached(model))]


def single(model: PreTrainedModel) -> Stack:
    """The stack of a model that has one.

    Raises:
        StageError: it has an encoder and a decoder.
    """
    anatomy.decoder(model)
    return stacks(model)[0]


def arguments(model: PreTrainedModel | Stack, tokens: int) -> list[Arguments]:
    """The keyword arguments with which each block is called for one window of `tokens` tokens.

    Where a block reads what the stack before gives, READ stands for it.

    Raises:
        StageError: the model has two stacks, or runs a block several times, or no block of a second stack reads the
            first as it is.
    """
    found = runs(model if isinstance(model, Stack) else single(model), tokens)
    if many := [times for times, _ in found if times > 1]:
        raise StageError("a block is run several times with the same weights", measured=many[0], limit=1)
    return [kwargs for _, kwargs in found]


def runs(stack: Stack, tokens: int) -> list[tuple[int, Arguments]]:
    """How often each block runs in a row (ALBERT's many times), and its arguments for one window, as `arguments`.

    Raises:
        StageError: a block's runs differ in more than what comes in, or no block of a second stack reads the first as
            it is.
    """
    short, returned = _arguments(stack, min(tokens, PROBE))
    if stack.after is not None and not all(any(value is READ for value in one.values()) for _, one in short):
        raise StageError(f"{type(stack.inner).__name__} changes what it reads of the encoder: it is not understood")
    # Blocks that return nothing but hidden states need not run: they hand on what came.
    handed = returned if all(isinstance(one, Tensor) or len(one) == 1 for one in returned) else []
    found = short if tokens <= PROBE else _arguments(stack, tokens, handed)[0]
    two = _arguments(stack, min(tokens, PROBE), handed, windows=2)[0]
    for (_, kwargs), (_, one), (_, both) in zip(found, short, two, strict=True):
        kwargs.each = frozenset(name for name in one if _longer(one[name], both[name]))
    return found


def _longer(one: Any, both: Any) -> bool:
    """Whether an argument for two windows is twice as long as for one."""
    tensors = isinstance(one, Tensor) and isinstance(both, Tensor)
    return tensors and both.dim() > 0 and both.shape == (2 * len(one), *one.shape[1:]) and len(one) > 0


def filled(kwargs: Mapping[str, Any], read_NSH: Tensor | None) -> Arguments:
    """A block's arguments with what it reads of the stack before."""
    made = Arguments({name: read_NSH if value is READ else value for name, value in kwargs.items()})
    made.each = kwargs.each if isinstance(kwargs, Arguments) else made.each
    return made


def together(kwargs: Mapping[str, Any], windows: int) -> dict[str, Any]:
    """A block's arguments for several windows in one call."""
    each = kwargs.each if isinstance(kwargs, Arguments) and windows > 1 else ()
    return {name: one.repeat(windows, *[1] * (one.dim() - 1)) if name in each else one for name, one in kwargs.items()}


@torch.no_grad()
def embedded(model: PreTrainedModel | Stack, ids_NT: Tensor) -> Tensor:
    """x_NTH that enters the first block."""
    stack = model if isinstance(model, Stack) else single(model)
    entered: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _Entered

    hook = stack.blocks[0].module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        x_NTH: Tensor | None = None
        for index, ids_1T in enumerate(ids_NT.split(1)):
            with suppress(_Entered):
                stack.run(ids_1T, _nothing(stack, 1))
            x_1TH = entered.pop()
            require_order(stack.blocks[0].name, x_1TH, ids_NT.shape[1], OTHER_WAYS)
            x_NTH = x_1TH.new_empty(len(ids_NT), *x_1TH.shape[1:]) if x_NTH is None else x_NTH
            x_NTH[index] = x_1TH[0]
    finally:
        hook.remove()
    release(stack.inner)  # a text's tokens stand all over the table, which is wide beside a small model's blocks
    assert x_NTH is not None
    return x_NTH


@torch.no_grad()
def left(stack: Stack, x_NTH: Tensor) -> Tensor:
    """What the stack gives for these outputs of its last block: its last norm of them, where it has one."""
    return torch.cat(list(leaving(stack, x_NTH)))


def leaving(stack: Stack, x_NTH: Tensor) -> Iterator[Tensor]:
    """The same window by window, [1, T, H]; a gradient can be taken."""
    ids_1T = torch.zeros(1, x_NTH.shape[1], dtype=torch.int64)
    kinds = _arguments(stack, 1)[1]
    for x_1TH in x_NTH.split(1):
        with _handing_on(stack, kinds, [x_1TH]):
            y_1TH = stack.run(ids_1T, _nothing(stack, 1))
        yield y_1TH


def answers(
    model: PreTrainedModel, ids: Iterable[Tensor], outputs: Iterable[Tensor], texts: Iterable[Tensor] | None = None
) -> Iterator[Tensor]:
    """What the model answers to texts, each by itself, where the last block gives these outputs; see `tasks.answer`.

    A gradient can be taken. An encoder is not run: what the decoder's last block gives is there.

    Args:
        model: any.
        ids: of each text, [1, T].
        outputs: of the last block to it, [1, T, H].
        texts: what the encoder reads, [1, S], where the answer's place depends on it (BART's classes stand at an end).
    """
    stack, task = stacks(model)[-1], tasks.task_of(model)
    kinds, read = _arguments(stack, 1)[1], _nothing(stack, 1)
    for ids_1T, x_1TH, text_1S in zip(ids, outputs, repeat(None) if texts is None else texts, strict=False):
        given = {"input_ids": ids_1T} if read is None else {"decoder_input_ids": ids_1T, "encoder_outputs": (read,)}
        if text_1S is not None:
            given["input_ids"] = text_1S
        with _handing_on(stack, kinds, [x_1TH]):
            yield tasks.answer(task, model(**given, **stack.plain))


class _Entered(Exception):
    """Ends a run at the first block."""


def _uncached(model: PreTrainedModel) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def _nothing(stack: Stack, tokens: int, windows: int = 1) -> Tensor | None:
    """In the place of what the stack before gives."""
    if stack.after is None:
        return None
    config: Any = stack.inner.config
    return torch.zeros(windows, tokens, config.hidden_size)


def _arguments(
    stack: Stack, tokens: int, instead: Sequence[Any] = (), windows: int = 1
) -> tuple[list[tuple[int, Arguments]], list[Any]]:
    """Runs and return value of each block; `instead`: the kinds of value that blocks are to hand on."""
    caught: list[tuple[nn.Module, Arguments]] = []
    returned: dict[int, Any] = {}
    modules = [block.module for block in stack.blocks]
    read_NTH = _nothing(stack, tokens, windows)
    names = {id(one): inspect.signature(one.forward) for one in modules}

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = names[id(module)].bind(*args, **kwargs)
        rest = [name for name, one in names[id(module)].parameters.items() if one.kind is one.VAR_KEYWORD]
        named = dict(given.arguments)
        for name in rest:
            named |= named.pop(name, {})
        del named[next(iter(given.arguments))]  # the hidden states
        own = {name: READ if value is read_NTH is not None else value for name, value in named.items()}
        caught.append((module, Arguments(own)))

    def leave(module: nn.Module, _args: Any, out: Any) -> None:
        returned[id(module)] = out
        release(module)  # its turn comes later

    hooks = [one.register_forward_pre_hook(enter, with_kwargs=True) for one in modules]
    hooks += [one.register_forward_hook(leave) for one in modules]
    try:
        with torch.no_grad(), _handing_on(stack, instead, []):
            stack.run(torch.zeros(windows, tokens, dtype=torch.int64), read_NTH)
    finally:
        for hook in hooks:
            hook.remove()
    return [_runs(block, caught) for block in stack.blocks], [returned[id(one)] for one in modules]


def _runs(block: Block, caught: Sequence[tuple[nn.Module, Arguments]]) -> tuple[int, Arguments]:
    """How often a block ran, always with the same arguments, and these."""
    places = [place for place, (module, _) in enumerate(caught) if module is block.module]
    if not places:
        raise StageError(f"{block.name} does not run: it takes no part in the model's answer")
    first = caught[places[0]][1]
    if places[-1] - places[0] >= len(places) or not all(_same(first, caught[place][1]) for place in places):
        raise StageError(f"{block.name} is run again after others, or with other arguments: it is not understood")
    return len(places), first


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return one is other or bool(one == other)


@contextmanager
def _handing_on(stack: Stack, kinds: Sequence[Any], given: list[Tensor]) -> Iterator[None]:
    """Within it, blocks return what they are given, in the form of `kinds`; the first one what is `given`, if it is."""

    def handing(kind: Any, first: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x_NTH = args[0] if args else kwargs["hidden_states"]
            x_NTH = given[0] if first and given else x_NTH
            return (x_NTH, *kind[1:]) if isinstance(kind, tuple) else x_NTH

        return forward

    modules = [block.module for block in stack.blocks]
    for one, kind in zip(modules, kinds, strict=False):
        one.forward = handing(kind, one is modules[0])
    try:
        yield
    finally:
        for one in modules:
            one.__dict__.pop("forward", None)
