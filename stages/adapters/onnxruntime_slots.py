"""Several sequences written at once by ONNX Runtime: side by side, or each of which comes and goes when it likes.

By one graph, or by an encoder and a decoder: there the text is read once, the answer by a cache of its own.

Rows that are written stand first in the buffers, so that a step reads and writes nothing of those that are free. What
was read of a prompt is kept a while after its row is free: a conversation's next message begins with all before it, and
is read from where they part, and so is what begins as another row does.

Shapes: N rows, T tokens, S tokens of a text, G heads of keys and values, M places, D their size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import ENCODER, WORTH, aligned, shared_tokens
from stages.adapters.onnxruntime import ROOM, CachedSession, Kept, Session, open_session, room_for
from stages.runtime.contract import StageError

REMEMBERED = 4096
"""Tokens that are kept of rows that are free: some 190 MB of a model of 135 million parameters."""


class Stepping:
    """See `stages.adapters.backends.Steps`.

    Args:
        opened: the graph.
        maximum_tokens: the longest sequence that it reads.
    """

    def __init__(self, opened: CachedSession, maximum_tokens: int) -> None:
        self.opened, self.most = opened, maximum_tokens
        self.kept = opened.begin(0, 0)

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read prompts."""
        rows_NT, counts_N = aligned(ids_NT, mask_NT)
        longest = rows_NT.shape[1]
        self.kept = self.opened.begin(len(rows_NT), min(longest + ROOM, max(longest, self.most)))
        return self.kept.read(rows_NT, counts_N, counts_N[:, None] - 1)[:, 0]

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        # A row that has ended may be led on beyond what the model reads; whatever it says is not wanted.
        self.kept.lengths_N = np.minimum(self.kept.lengths_N, self.most - 1)
        return self.kept.read(tokens_N[:, None])[:, 0]

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows, each as often as it is named."""
        self.kept.reorder(rows_N)

    def truncate(self, tokens: int) -> None:
        """See `stages.adapters.backends.Rewinding`; what stands behind a row's end is read by nobody."""
        self.kept.lengths_N = np.minimum(self.kept.lengths_N, tokens)

    def more(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `stages.adapters.backends.Rewinding`."""
        logits_V: NDArray[np.float32] = self.kept.read(ids_T[None], None, np.array([[len(ids_T) - 1]]))[0, 0]
        return logits_V

    @property
    def kept_bytes(self) -> int:
        """Of all keys and values, which the next token reads."""
        a_place = sum(one.itemsize * one.shape[1] * one.shape[3] for one in self.kept.places.values())
        return a_place * int(self.kept.lengths_N.sum())


Beside = Callable[[int], dict[str, NDArray[Any]]]


class RowSlots:
    """See `stages.adapters.backends.Slots`.

    Args:
        opened: the graph.
        maximum_tokens: the longest sequence that it reads.
        beside: (number of rows) -> what goes in beside the cache; then a prompt is not all that a row depends on, and
            nothing is kept of a free one.
    """

    def __init__(self, opened: CachedSession, maximum_tokens: int, beside: Beside | None = None) -> None:
        self.opened, self.most, self._beside = opened, maximum_tokens, beside
        self.kept = opened.begin(0, ROOM)
        self._buffers = self.kept.places
        self._tokens, self._left = list[list[int]](), deque[tuple[list[int], dict[str, NDArray[Any]]]]()

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Read a prompt into a new row, from where it parts from all that was read before."""
        one = self.opened.begin(1, len(ids_T))
        shared, places = self._begun(ids_T)
        if shared >= WORTH:
            one.lengths_N[:] = shared
            for name, array in one.places.items():
                array[0, :, :shared] = places[name][:, :shared]
        return self.put(one, ids_T)

    def put(self, one: Kept, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """Have the cache of one sequence read what it lacks of a prompt, and take it as a new row."""
        tokens, rows, read = len(ids_T), len(self.kept.lengths_N), int(one.lengths_N[0])
        logits_V: NDArray[np.float32] = one.read(ids_T[None, read:], None, np.array([[tokens - read - 1]]))[0, 0]
        self._make_room(rows + 1, tokens + 1)
        for name, buffer in self._buffers.items():
            buffer[rows, :, :tokens] = one.places[name][0]
        self._take(np.append(self.kept.lengths_N, tokens))
        self._tokens.append(ids_T.tolist())
        return logits_V

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        lengths_N = np.minimum(self.kept.lengths_N, self.most - 1)
        self._make_room(len(lengths_N), int(lengths_N.max()) + 1)
        self._take(lengths_N)
        logits_NV = self.kept.read(tokens_N[:, None])[:, 0]
        for said, length, token in zip(self._tokens, lengths_N.tolist(), tokens_N.tolist(), strict=True):
            said[length:] = [token]
        return logits_NV

    def leave(self, row: int) -> None:
        """Free a row."""
        lengths_N = self.kept.lengths_N
        last = len(lengths_N) - 1
        self._remember(row)
        self._tokens[row] = self._tokens[last]
        self._tokens.pop()
        if row != last:
            for buffer in self._buffers.values():
                buffer[row, :, : lengths_N[last]] = buffer[last, :, : lengths_N[last]]
            lengths_N[row] = lengths_N[last]
        self._take(lengths_N[:-1])
        if last == 0:  # what long texts took is given back
            self._buffers = self.opened.begin(0, ROOM).places

    def _begun(self, ids_T: NDArray[np.int64]) -> tuple[int, dict[str, NDArray[Any]]]:
        """With how many tokens that were read a prompt begins at most, and what the cache keeps of them, [G, M, D]."""
        most, of = 0, dict[str, NDArray[Any]]()
        for at, said in enumerate(self._tokens):
            if (shared := shared_tokens(ids_T, said)) > most:
                most, of = shared, {name: buffer[at] for name, buffer in self._buffers.items()}
        for said, places in self._left:
            if (shared := shared_tokens(ids_T, said)) > most:
                most, of = shared, places
        return most, of

    def _remember(self, row: int) -> None:
        said = self._tokens[row]
        if self._beside is not None or not WORTH <= len(said) <= REMEMBERED:
            return
        # What this one went on from is in it.
        self._left = deque(one for one in self._left if one[0] != said[: len(one[0])])
        try:
            kept = {name: buffer[row, :, : len(said)].copy() for name, buffer in self._buffers.items()}
        except MemoryError:  # what is being written comes first
            self._left.clear()
            return
        self._left.append((said, kept))
        while sum(len(one) for one, _ in self._left) > REMEMBERED:
            self._left.popleft()

    def _take(self, lengths_N: NDArray[np.int64]) -> None:
        self.kept = Kept(self.opened, 0, 0)
        self.kept.lengths_N = lengths_N
        if self._beside is not None:
            self.kept.beside = self._beside(len(lengths_N))
        self.kept.places = {name: buffer[: len(lengths_N)] for name, buffer in self._buffers.items()}

    def _make_room(self, rows: int, places: int) -> None:
        have_rows, _, have_places, _ = next(iter(self._buffers.values())).shape
        if rows <= have_rows and places <= have_places:
            return
        more_rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        more_places = have_places if places <= have_places else min(2 * places, max(self.most, places))
        more = [(0, more_rows - have_rows), (0, 0), (0, more_places - have_places), (0, 0)]
        with room_for(more_rows, more_places):
            self._buffers = {name: np.pad(buffer, more) for name, buffer in self._buffers.items()}


@dataclass(frozen=True)
class StackSessions:
    """See `stages.adapters.backends.Stacks`."""

    encoder: Session
    decoder: CachedSession

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], places: int) -> Kept:
        """Read the texts."""
        kept, found = self.decoder.begin(len(ids_NT), places), self.encoder.outputs(ids_NT, mask_NT)
        taken = {one.name for one in self.decoder.session.get_inputs()}
        # Who looks into a graph has it give more than the decoder takes.
        kept.beside = {"attention_mask": mask_NT, **{name: one for name, one in found.items() if name in taken}}
        return kept

    def outputs(self, ids_NT: NDArray[np.int64], said_NT: NDArray[np.int64]) -> list[dict[str, NDArray[np.float32]]]:
        """Every output of the decoder's graph but the cache, and of the encoder's, by their names."""
        mask_NT = np.ones_like(ids_NT)
        kept = self.begin(ids_NT, mask_NT, said_NT.shape[1])
        return [self.decoder.outputs(said_NT, kept), self.encoder.outputs(ids_NT, mask_NT)]


class StackSlots:
    """See `stages.adapters.backends.Slots`; what a text gives the decoder lies beside its row, padded on the right.

    Args:
        stacks: both graphs; the decoder's takes rows that are each on a step of their own.
        maximum_tokens: the longest answer.
    """

    def __init__(self, stacks: StackSessions, maximum_tokens: int) -> None:
        self._stacks, self._texts = stacks, dict[str, NDArray[Any]]()
        self._rows = RowSlots(stacks.decoder, maximum_tokens, self._beside)

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Read a text and what was said to it into a new row."""
        assert said_T is not None
        one = self._stacks.begin(ids_T[None], np.ones_like(ids_T[None]), len(said_T))
        row = len(self._rows.kept.lengths_N)
        for name, array in one.beside.items():
            self._texts[name] = _with_room(self._texts.get(name, array[:0]), row + 1, array)
            lies = self._texts[name][row]
            lies[...] = 0
            lies[_first(array)] = array[0]
        return self._rows.put(one, said_T)

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        return self._rows.next(tokens_N)

    def leave(self, row: int) -> None:
        """Free a row."""
        last = len(self._rows.kept.lengths_N) - 1
        for array in self._texts.values():
            array[row] = array[last]
        if last == 0:  # what long texts took is given back
            self._texts = {}
        self._rows.leave(row)

    def _beside(self, rows: int) -> dict[str, NDArray[Any]]:
        return {name: array[:rows] for name, array in self._texts.items()}


def _first(array: NDArray[Any]) -> tuple[slice, ...]:
    """Where the tokens of a text stand in its row, [S] of a mask and [G, S, D] of keys and values."""
    tokens = slice(0, array.shape[_axis(array)])
    return (*[slice(None)] * (_axis(array) - 1), tokens)


def _axis(array: NDArray[Any]) -> int:
    return min(2, array.ndim - 1)


def _with_room(have: NDArray[Any], rows: int, array: NDArray[Any]) -> NDArray[Any]:
    """The same with so many rows and as many tokens of texts as an array has."""
    at, size = _axis(array), list(have.shape)
    size[0] = size[0] if rows <= size[0] else max(rows, 2 * size[0])
    size[at] = max(size[at], array.shape[at])
    if size == list(have.shape):
        return have
    with room_for(size[0], size[at]):
        return np.pad(have, [(0, wanted - there) for wanted, there in zip(size, have.shape, strict=True)])


def open_stacks(path: Path, *, literal: bool = False) -> StackSessions:
    """Load a decoder's graph, and the encoder's that stands beside it; see `onnxruntime.open_session`."""
    encoder, decoder = open_session(path.with_name(ENCODER), literal=literal), open_session(path, literal=literal)
    if not (isinstance(encoder, Session) and isinstance(decoder, CachedSession)):
        raise StageError(
            "the two graphs are no encoder and no decoder",
            measured=f"{type(encoder).__name__} and {type(decoder).__name__}",
            limit="Session and CachedSession",
            remedy="Export the model again.",
        )
    return StackSessions(encoder, decoder)
