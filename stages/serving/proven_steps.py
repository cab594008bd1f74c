"""Steps of a checkpoint that keep what they read where that is seen to answer as the whole text does.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Forward, Rewinding
from stages.runtime.contract import StageError
from stages.serving.generate import padded

TRIED, ALIKE = 4, 1e-2
"""Tokens by which a model is tried, and how far of the largest logit two ways to read them may differ."""


class Anew:
    """See `stages.adapters.backends.Rewinding`; nothing is kept: each token reads its row again, each row by itself."""

    def __init__(self, forward: Forward, longest: int | None) -> None:
        self.forward, self.longest, self.rows = forward, longest, list[list[int]]()

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read prompts."""
        self.rows = [ids_T[mask_T > 0].tolist() for ids_T, mask_T in zip(ids_NT, mask_NT, strict=True)]
        return self._read()

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one more token of every row."""
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens_N.tolist(), strict=True)]
        return self._read()

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows, each as often as it is named."""
        self.rows = [self.rows[row] for row in rows_N]

    def truncate(self, tokens: int) -> None:
        """Forget all but the first so many tokens."""
        self.rows = [row[:tokens] for row in self.rows]

    def more(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read more tokens of a single sequence."""
        self.rows = [[*row, *ids_T.tolist()] for row in self.rows]
        logits_V: NDArray[np.float32] = self._read()[0]
        return logits_V

    def _read(self) -> NDArray[np.float32]:
        rows = [np.array([row[: self.longest]], dtype=np.int64) for row in self.rows]
        return np.stack([self.forward(row_1T, np.ones_like(row_1T))[0, -1] for row_1T in rows])


class Proven:
    """Steps that keep what they read where that was seen to answer as the whole text does, else steps that read anew.

    Some models count positions from the padding on that has rows end together (BART's decoder, XLM-RoBERTa), and some
    keep nothing, or not what they need. It is tried once for rows of equal length and once for others. Of a model that
    is told its positions it is only seen whether it keeps anything: where activations are rounded two ways to read one
    text differ by far more than their noise, and neither is wrong.
    """

    def __init__(
        self,
        kept: Callable[[], Rewinding],
        anew: Callable[[], Anew],
        tokens: Sequence[int],
        found: dict[bool, bool],
        *,
        placed: bool,
    ) -> None:
        self.kept, self.anew, self.tokens, self.found, self.placed = kept, anew, tokens, found, placed
        self.way: Rewinding | Anew = anew()

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read prompts."""
        equal = bool(mask_NT.all())
        if equal not in self.found:
            self.found[equal] = self._answers_alike(equal)
        self.way = self.kept() if self.found[equal] else self.anew()
        return self.way.begin(ids_NT, mask_NT)

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one more token of every row."""
        return self.way.next(tokens_N)

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows, each as often as it is named."""
        self.way.reorder(rows_N)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first so many tokens."""
        self.way.truncate(tokens)

    def more(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read more tokens of a single sequence."""
        return self.way.more(ids_T)

    @property
    def kept_bytes(self) -> int:
        """Of all keys and values, which the next token reads."""
        return int(getattr(self.way, "kept_bytes", 0))

    def _answers_alike(self, equal: bool) -> bool:
        rows = [self.tokens] if equal else [self.tokens, self.tokens[1:]]
        read, last_N = padded([row[:-1] for row in rows], left=True), np.array([row[-1] for row in rows])
        way = self.kept()
        try:
            found = way.begin(*read), way.next(last_N)
        except (AttributeError, LookupError, RuntimeError, StageError, TypeError, ValueError):  # in a way of its own
            return False
        if self.placed:
            return True
        alone = self.anew()
        wanted = alone.begin(*read), alone.next(last_N)
        return all(np.abs(a - b).max() <= ALIKE * np.abs(b).max() for a, b in zip(found, wanted, strict=True))
