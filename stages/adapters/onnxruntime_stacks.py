"""An encoder and a decoder by ONNX Runtime: the text is read once, the answer by a cache of its own.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import ENCODER
from stages.adapters.onnxruntime import CachedSession, Kept, Session, open_session, room_for
from stages.adapters.onnxruntime_slots import RowSlots
from stages.runtime.contract import StageError


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
