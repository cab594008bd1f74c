"""Rows that come and go, for models that do not offer them: each is a sequence by itself.

Shapes: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import WORTH, Forward, Rewinding, Slots, Steps, shared_tokens
from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS, padded


def rows_of(model: Answerer) -> Slots:
    """Rows of a model that continues texts: its own, where it has some."""
    if model.slots is not None:
        return model.slots()
    return Rereading(model.forward) if model.steps is None else Apart(model.steps)


class Apart:
    """See `stages.adapters.backends.Slots`; each row keeps what it has read by itself, and is read by itself.

    The last one that left is kept until the next comes, who may go on from it: of a conversation the last message alone
    is read.
    """

    def __init__(self, begin: Callable[[], Steps]) -> None:
        self._begin, self._rows = begin, list[tuple[Steps, list[int]]]()
        self._left: tuple[Steps, list[int]] | None = None

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Read a prompt into a new row."""
        if said_T is None and (begun := self._gone_on(ids_T)) is not None:
            row, logits_V = begun
        else:
            row = self._begin()
            logits_V = row.begin(ids_T[None], np.ones_like(ids_T[None]))[0]
        for token in () if said_T is None else said_T:
            logits_V = row.next(token[None])[0]
        self._rows.append((row, ids_T.tolist()))
        return logits_V

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        found = np.stack([row.next(tokens_N[at : at + 1])[0] for at, (row, _) in enumerate(self._rows)])
        for (_, said), token in zip(self._rows, tokens_N.tolist(), strict=True):
            said.append(token)
        return found

    def leave(self, row: int) -> None:
        """Free a row."""
        self._left = self._rows[row]
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def _gone_on(self, ids_T: NDArray[np.int64]) -> tuple[Steps, NDArray[np.float32]] | None:
        """Who left last, having read a prompt from where it parts from what it had read; its memory is free if not."""
        left, self._left = self._left, None
        row, said = left or (None, [])
        if not isinstance(row, Rewinding) or (shared := shared_tokens(ids_T, said)) < WORTH:
            return None
        try:
            row.truncate(shared)
            return row, row.more(ids_T[shared:])
        except StageError:  # it cannot be cut there, or there is no room: the prompt is read as any other
            return None


class Rereading:
    """See `stages.adapters.backends.Slots`; nothing is kept, and each token reads all before it again."""

    def __init__(self, forward: Forward) -> None:
        self._forward, self._rows = forward, list[list[int]]()

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Read a prompt into a new row."""
        logits_V: NDArray[np.float32] = self._forward(ids_T[None], np.ones_like(ids_T[None]))[0, -1]
        self._rows.append(ids_T.tolist())
        return logits_V

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read all rows again, each with a token more."""
        rows = [[*row, token] for row, token in zip(self._rows, tokens_N.tolist(), strict=True)]
        found: list[NDArray[np.float32]] = []
        for some in (rows[start : start + ROWS] for start in range(0, len(rows), ROWS)):
            logits_NTV = self._forward(*padded(some))
            found += [logits_TV[len(row) - 1] for logits_TV, row in zip(logits_NTV, some, strict=True)]
        self._rows = rows
        return np.stack(found)

    def leave(self, row: int) -> None:
        """Free a row."""
        self._rows[row] = self._rows[-1]
        self._rows.pop()
