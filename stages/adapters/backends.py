"""What builds and executes engines: a file a backend, `<name>_backend.py`, found by its name. Its facts are asked for
where no vendor's library is: such a file imports it only to build or to execute.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from stages.runtime.contract import Metrics, Progress, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TYPES = "token_type_ids"
"""The input of a graph that is told which segment each token is of."""
ENCODER = "encoder.onnx"
"""The graph beside one that answers, which reads what is answered to; see `encoder_of`."""
WORTH = 32
"""A prompt that begins with fewer tokens that were read before is read whole."""
GRAPHS_BACKEND = "onnxruntime"
"""What answers for a graph that was not compiled."""

# Text, since recipes are checked without numpy.
Forward = Callable[..., "NDArray[np.float32]"]
"""(ids_NT, mask_NT) -> logits_NTV; the mask is 0 where a row is padded: on its right, if it is a decoder's.

What `tells_segments` takes type_NT besides, the segment that each token is of; without it all are of the first.
"""


class Steps(Protocol):
    """A model that keeps what it has read of some sequences."""

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read prompts, padded on either side; returns the logits of what comes next, [N, V]."""

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one more token of each sequence; returns the logits of what comes next, [N, V]."""

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows, each as often as it is named."""


@runtime_checkable
class Rewinding(Steps, Protocol):
    """Steps of a single sequence, which can go on from an earlier token."""

    def truncate(self, tokens: int) -> None:
        """Forget all but its first so many tokens.

        Raises:
            StageError: what was kept cannot be cut there; it is of no use any more.
        """

    def more(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read more of its tokens; returns the logits of what comes next, [V]."""


class Begun(Protocol):
    """A decoder that keeps what it has said of some texts."""

    def read(self, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read more tokens of each answer; returns the logits of what comes next to each, [N, T, V]."""

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows and their texts, each as often as it is named."""


class Stacks(Protocol):
    """A model with an encoder that reads texts and a decoder that answers them."""

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], places: int) -> Begun:
        """Read texts, padded on their right; their answers have room for so many tokens to begin with."""


class Slots(Protocol):
    """A model that writes several sequences at once, each of which comes and goes when it likes."""

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Read a prompt, which takes the row behind all others; returns the logits of what comes next, [V].

        Args:
            ids_T: a prompt and what was said to it; of a decoder behind an encoder what the latter reads.
            said_T: of such a one what the decoder has said to it.
        """

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one more token of every row; returns the logits of what comes next, [N, V]."""

    def leave(self, row: int) -> None:
        """Give up a row. The last one takes its place."""


@dataclass(frozen=True)
class Execution:
    """An engine that was opened.

    Attributes:
        target: what executes it, `onnxruntime:cpu`.
        forward: answers to whole sequences; None where `stacks` does, for who knows how an answer begins.
        steps: begins to keep what it reads, of sequences of so many tokens at most; None where nothing is kept.
        slots: the same for sequences that come and go. Of `stacks` the token that an answer begins behind is said, too.
        stacks: both stacks of a model that has an encoder and a decoder.
        tells_segments: `forward` takes the segments of tokens, too.
    """

    target: str
    forward: Forward | None
    steps: Callable[[int], Steps] | None = None
    slots: Callable[[int], Slots] | None = None
    stacks: Stacks | None = None
    tells_segments: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be built.

    Attributes:
        graph: model.onnx; external data beside it, and an encoder's graph if the model has one. It takes and gives keys
            and values if the backend `keeps` them.
        architectures: GPUs it is for, none for the processor.
        maximum_tokens: the longest sequence.
        maximum_batch: the largest batch.
        lower: writes a graph to a path with ONNX Runtime's own integer products, for backends that know them.
        two_in_four: its weights have two zeros in four, for kernels that leave them out.
    """

    graph: Path
    architectures: tuple[str, ...]
    maximum_tokens: int
    maximum_batch: int
    lower: Callable[[Path, Path], Metrics]
    two_in_four: bool = False


def _anything(architecture: str, precisions: Collection[str]) -> None:
    """It multiplies every format."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What executes engines.

    Attributes:
        library: the distribution that executes, whose version a measurement is bound to.
        executable: name of the file that is built; other files' names begin with it.
        build: (what is asked, folder, progress) -> metrics; writes the executable into the folder.
        execute: (executable, architectures, whether its bytes were verified) -> the opened engine.
        architectures: GPUs it builds for; none: it is for the processor, and its engines are executed and judged.
        keeps: whether it is given graphs that keep what they have read, where there are some.
        refuse: raises StageError where an architecture, "" for the processor, multiplies not all of these formats.
    """

    library: str
    executable: str
    build: Callable[[Asked, Path, Progress], Metrics]
    execute: Callable[[Path, Sequence[str], bool], Execution]
    architectures: tuple[str, ...] = ()
    keeps: bool = False
    refuse: Callable[[str, Collection[str]], None] = _anything


def aligned(
    ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with their tokens that count on the left, and how many they are."""
    import numpy as np  # recipes are checked without it

    if mask_NT is None or mask_NT.all():
        return ids_NT, np.full(len(ids_NT), ids_NT.shape[1])
    counts_N = mask_NT.sum(1)
    rows_NT = np.zeros((len(ids_NT), counts_N.max()), np.int64)
    for row_T, ids_T, mask_T, count in zip(rows_NT, ids_NT, mask_NT, counts_N, strict=True):
        row_T[:count] = ids_T[mask_T > 0]
    return rows_NT, counts_N


def encoder_of(executable: Path) -> Path:
    """Where the encoder stands, if there is one, beside what answers: in a file of the same kind."""
    return executable.with_name(ENCODER).with_suffix(executable.suffix)


def backends() -> tuple[str, ...]:
    """The names of all backends; no file of theirs is imported."""
    # A listing, so that a backend is one file. Z to A is the order that recipes' schema and errors always had.
    files = Path(__file__).parent.glob("*_backend.py")
    return tuple(sorted((path.stem.removesuffix("_backend") for path in files), reverse=True))


def module_of(name: str) -> str:
    """Where a backend stands.

    Raises:
        StageError: there is none of this name.
    """
    module = f"stages.adapters.{name}_backend"
    if not re.fullmatch("[a-z0-9_]+", name) or find_spec(module) is None:
        raise StageError(f"there is no backend {name!r}", limit=", ".join(backends()))
    return module


def backend(name: str) -> Backend:
    """A backend by its name.

    Raises:
        StageError: there is none of this name.
    """
    found: Backend = import_module(module_of(name)).BACKEND
    return found


def refuse_impossible(name: str, architectures: Sequence[str], precisions: Collection[str] = ()) -> None:
    """Refuse before anything is built what no builder can build.

    Args:
        name: of the backend.
        architectures: as a recipe lists them.
        precisions: number formats of the graph: `float32`, `float16`, `int8`, `int4`, `fp8`, `fp4`.

    Raises:
        StageError: an unknown or missing architecture, or a format that one of them has not.
    """
    chosen = backend(name)
    allowed = chosen.architectures
    if not allowed and architectures:
        raise StageError(
            f"{name} is for the processor and takes no `architectures`",
            measured=", ".join(architectures),
            remedy="Remove them, or choose backend: tensorrt_rtx.",
        )
    if allowed and not architectures:
        raise StageError(f"{name} needs `architectures`", measured="none", limit=", ".join(allowed))
    for architecture in architectures:
        if architecture not in allowed:
            other = [one for one in backends() if architecture in backend(one).architectures]
            remedy = f"Choose backend: {other[0]} for it." if other else "Name one of these."
            raise StageError(f"{name} builds nothing for {architecture!r}", limit=", ".join(allowed), remedy=remedy)
        chosen.refuse(architecture, precisions)
    if not allowed:
        chosen.refuse("", precisions)


def shared_tokens(ids_T: NDArray[np.int64], said: Sequence[int]) -> int:
    """With how many tokens of another a prompt begins; its last one is left to be read."""
    import numpy as np

    most = min(len(ids_T) - 1, len(said))
    parted = np.flatnonzero(ids_T[:most] != np.array(said[:most], np.int64))
    return int(parted[0]) if len(parted) else most
