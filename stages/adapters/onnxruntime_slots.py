"""Several sequences written at once by one graph: side by side, or each of which comes and goes when it likes.

Of the latter, rows that are written stand first in the buffers, so that a step reads and writes nothing of those that
are free.

Shapes: N rows, T tokens, G heads of keys and values, M places, D their size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import aligned
from stages.adapters.onnxruntime import ROOM, CachedSession, Kept, room_for


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
        beside: (number of rows) -> what goes in beside the cache.
    """

    def __init__(self, opened: CachedSession, maximum_tokens: int, beside: Beside = lambda rows: {}) -> None:
        self.opened, self.most, self._beside = opened, maximum_tokens, beside
        self.kept = opened.begin(0, ROOM)
        self._buffers = self.kept.places

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Read a prompt into a new row."""
        return self.put(self.opened.begin(1, len(ids_T)), ids_T)

    def put(self, one: Kept, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """Have an empty cache of one sequence read a prompt, and take it as a new row."""
        tokens, rows = len(ids_T), len(self.kept.lengths_N)
        logits_V: NDArray[np.float32] = one.read(ids_T[None], None, np.array([[tokens - 1]]))[0, 0]
        self._make_room(rows + 1, tokens + 1)
        for name, buffer in self._buffers.items():
            buffer[rows, :, :tokens] = one.places[name][0]
        self._take(np.append(self.kept.lengths_N, tokens))
        return logits_V

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        lengths_N = np.minimum(self.kept.lengths_N, self.most - 1)
        self._make_room(len(lengths_N), int(lengths_N.max()) + 1)
        self._take(lengths_N)
        return self.kept.read(tokens_N[:, None])[:, 0]

    def leave(self, row: int) -> None:
        """Free a row."""
        lengths_N = self.kept.lengths_N
        last = len(lengths_N) - 1
        if row != last:
            for buffer in self._buffers.values():
                buffer[row, :, : lengths_N[last]] = buffer[last, :, : lengths_N[last]]
            lengths_N[row] = lengths_N[last]
        self._take(lengths_N[:-1])
        if last == 0:  # what long texts took is given back
            self._buffers = self.opened.begin(0, ROOM).places

    def _take(self, lengths_N: NDArray[np.int64]) -> None:
        self.kept = Kept(self.opened, 0, 0)
        self.kept.lengths_N, self.kept.beside = lengths_N, self._beside(len(lengths_N))
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
