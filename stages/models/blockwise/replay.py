"""Run a block again without doing again what it did before.

While a block is compressed it runs once for each place that its maps read, each time a little further, and all that
comes before that place is as it was. What the costly functions gave there is kept and given again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

COSTLY = frozenset({functional.linear, functional.scaled_dot_product_attention})
"""What takes nearly all of a block's time; anything else is computed again."""


@dataclass(frozen=True)
class _Given:
    """What a call gave, how often that had been changed in place, its weights, and the sums of what it read."""

    made: Tensor
    version: float
    weight: Tensor | None
    read: Sequence[tuple[Sequence[int], float]]

    def made_of(self, weight: Tensor | None, read: Sequence[tuple[Sequence[int], float]]) -> bool:
        """Whether a call of these would give the same."""
        return self.weight is weight and self.read == read


class Replay(TorchFunctionMode):
    """Answers costly calls, in their order, by what they gave in the run before; calls past those are kept.

    The runs must be of one block on one input. From the first call on that has other weights or inputs than before,
    and from the first result on that the block has changed in place, everything is computed again. Inputs are other
    ones where a map that is new multiplies by its weight in a way of its own, which is no costly call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: list[_Given] = []
        self._place = 0
        self._marked: int | None = None

    def __enter__(self) -> Replay:
        self._place, self._marked = 0, None
        whole = [_version(one.made) == one.version for one in self._given]
        del self._given[whole.index(False) if False in whole else len(whole) :]
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        # Without a mark nothing of this run may be given again: what it did is known to be the last.
        del self._given[0 if self._marked is None else self._marked :]

    def mark(self) -> None:
        """What comes after this moment of the run may be different in the next one."""
        if self._marked is None:
            self._marked = self._place

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Give what is kept, or call the function."""
        if func not in COSTLY:
            return func(*args, **(kwargs or {}))
        weight = args[1] if func is functional.linear else None
        inputs = args[:1] if func is functional.linear else args
        read = [(one.shape, float(one.sum(dtype=torch.float64))) for one in inputs if isinstance(one, Tensor)]
        place = self._place
        self._place += 1
        if place < len(self._given) and not self._given[place].made_of(weight, read):
            del self._given[place:]
        if place == len(self._given):
            made = func(*args, **(kwargs or {}))
            self._given.append(_Given(made, _version(made), weight, read))
        return self._given[place].made


def _version(tensor: Tensor) -> float:
    """How often it was changed in place; where that is not counted, nothing equals it."""
    return math.nan if tensor.is_inference() else tensor._version
