"""What one pass over the blocks does to a site's maps: the protocol, and techniques that change weights alone.

Shapes: M tokens at once, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.anatomy.blocks import Block
from stages.models.blockwise.site_moments import Seen


@dataclass(frozen=True)
class Compressed:
    """One map's new tensors by name, and its row for the table."""

    tensors: Mapping[str, Tensor]
    row: Mapping[str, Any]


class Technique(Protocol):
    """How one site's maps are compressed. Names are paths in the model."""

    @property
    def idle(self) -> bool:
        """Whether blocks may have maps that read nothing; these stay as they are."""

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


class Change(Protocol):
    """What is done to a site's maps; see `Technique`."""

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> Mapping[str, Compressed]:
        """New tensors for the maps that read one input, by path in the block."""

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Put a map's new tensors in its place."""


@dataclass(frozen=True)
class OnWeights:
    """A change as a technique that leaves what maps read as it is.

    Attributes:
        change: what is done.
        idle: whether blocks may have maps that read nothing; these stay as they are.
        sources: of a block and a site the source of each window, where the moment is wanted of each by its own.
        reads: whether the change reads the moments of a site: of a block, the site, and those of its maps whose output
            goes into the residual stream. Of others none are taken, and their maps stay.
    """

    change: Change
    idle: bool = False
    sources: Callable[[Block, Sequence[str]], Sequence[str]] = lambda _block, _site: ()
    reads: Callable[[Block, Sequence[str], Collection[str]], bool] = lambda _block, _site, _adding: True

    def enter(self, block: Block) -> None:
        """See Technique."""

    def begin(self, names: Sequence[str], peak: float) -> None:
        """See Technique."""

    def read(self, name: str, z_MI: Tensor) -> Tensor:
        """See Technique."""
        return z_MI

    def compress(self, block: Block, maps: Mapping[str, nn.Linear], seen: Seen) -> Mapping[str, Compressed]:
        """See Technique."""
        return self.change.compress(block, maps, seen)

    def apply(self, model: PreTrainedModel, path: str, tensors: Mapping[str, Tensor]) -> None:
        """See Technique."""
        self.change.apply(model, path, tensors)


def put(model: PreTrainedModel, path: str, w_OI: Tensor) -> None:
    """Give the linear map called `path` these weights."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(w_OI.to(linear.weight.dtype).contiguous(), requires_grad=False)


def mended(maps: Mapping[str, nn.Linear], seen: Seen, but: str = "") -> dict[str, Compressed]:
    """Maps whose output goes into the residual stream, fitted to make up for what it has drifted."""
    return {
        path: Compressed({"weight": seen.target(path, one.weight.detach())}, {})
        for path, one in maps.items()
        if path != but and path in seen.residual_OI
    }
