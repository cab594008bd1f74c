"""What a checkpoint's settings of generation allow to come next, as transformers' own generation follows them.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.runtime.contract import StageError
from stages.serving.generation import PENALTIES

_WHOLE = "a whole number"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may come next; the defaults allow everything.

    Attributes:
        repetition_penalty: what it costs to say a token again, where nobody who asks says it.
        no_repeat_ngram_size: so many tokens in a row come once, the prompt's too; 0 for any number of times.
        bad_words: runs of tokens that are never said whole.
        min_length: tokens with those of the prompt, or with the one that an answer begins behind, before it may end.
        min_new_tokens: tokens of the answer before it may end.
        first: the token that is said behind a single one.
        suppressed: tokens that are never said.
        suppressed_first: tokens that an answer does not begin with; where `first` is said, that stand behind it.
        ends: tokens that end an answer.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    first: int | None = None
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    ends: frozenset[int] = frozenset()

    def allowed(self, score_V: NDArray[np.float32], seen: Sequence[int], said: int) -> NDArray[np.float32]:
        """Scores of what comes next, minus infinity where it must not.

        Args:
            score_V: logits or log-probabilities.
            seen: what a decoder has read, the last `said` tokens of it its own.
            said: tokens of the answer so far.
        """
        if self.first is not None and len(seen) == 1:
            return _only(score_V, self.first)
        out = [*self.suppressed, *self._words(seen), *self._runs(seen)]
        if len(seen) < self.min_length or said < self.min_new_tokens:
            out += self.ends
        behind_first = self.first is not None and len(seen) - said == 1
        if said == behind_first:
            out += self.suppressed_first
        if not out:
            return score_V
        # Settings name tokens that a model has no score of: -1 for none, or those of a larger table.
        found_V = score_V.copy()
        found_V[[one for one in out if 0 <= one < len(found_V)]] = -np.inf
        return found_V

    def _words(self, seen: Sequence[int]) -> list[int]:
        """The last tokens of words that are said but for them."""
        return [
            word[-1]
            for word in self.bad_words
            if len(word) == 1 or (len(word) <= len(seen) and (*seen[1 - len(word) :],) == word[:-1])
        ]

    def _runs(self, seen: Sequence[int]) -> list[int]:
        """What stood behind an earlier run of all tokens but one that stands at the end."""
        size = self.no_repeat_ngram_size
        if not size or len(seen) < size:
            return []
        seen_T = np.asarray(seen, np.int64)
        run_RT = np.lib.stride_tricks.sliding_window_view(seen_T, size)
        again_R = (run_RT[:, :-1] == seen_T[len(seen_T) - size + 1 :]).all(1)
        found: list[int] = run_RT[again_R, -1].tolist()
        return found


FREE = Rules()
"""Settings that ask for nothing."""


def rules_of(settings: Mapping[str, Any], ends: frozenset[int]) -> Rules:
    """As generation_config.json, or else config.json says it.

    Raises:
        StageError: it asks for what is none.
    """
    least, most = PENALTIES
    penalty = _told(settings, "repetition_penalty", 1.0, f"a number from {least} to {most}", _penalty)
    counts = {
        name: _told(settings, name, 0, f"{_WHOLE} from 0 on", lambda one: _token(one) and one >= 0)
        for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens")
    }
    if settings.get("min_new_tokens") is not None:
        counts["min_length"] = 0
    first = _told(settings, "forced_bos_token_id", None, _WHOLE, _token)
    suppressed, begun = (
        tuple(_told(settings, name, (), "a list of whole numbers", _tokens))
        for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    words = _told(settings, "bad_words_ids", (), "a list of lists of whole numbers", _words)
    bad = tuple((*word,) for word in words if len(word) > 1 or word[0] not in ends)
    return Rules(
        repetition_penalty=float(penalty),
        bad_words=bad,
        first=first,
        suppressed=suppressed,
        suppressed_first=begun,
        ends=ends,
        **counts,
    )


def _told(settings: Mapping[str, Any], name: str, default: Any, limit: str, holds: Callable[[Any], bool]) -> Any:
    value = settings.get(name)
    if value is None:
        return default
    if not holds(value):
        raise StageError(
            "the settings of generation ask for what is none",
            measured=f"{name}: {value!r:.60}",
            limit=limit,
            remedy="Correct generation_config.json.",
        )
    return value


def _penalty(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return real and PENALTIES[0] <= value <= PENALTIES[1]


def _token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_token, value))


def _words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_tokens(word) and len(word) for word in value)


def _only(score_V: NDArray[np.float32], token: int) -> NDArray[np.float32]:
    found_V = np.full_like(score_V, -np.inf)
    found_V[token] = 0
    return found_V
