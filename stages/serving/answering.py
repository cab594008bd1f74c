"""What a model with an encoder and a decoder says of a text, whatever executes both.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Begun, Execution, Forward, Slots, Stacks, Steps
from stages.runtime.contract import StageError
from stages.serving.beams import scoring
from stages.serving.generate import padded
from stages.serving.sampling import log_probabilities

NEVER = -1e30
"""The logit of what must not be said: finite, so that two models that must not say it differ by nothing there."""
ROOM = 64
"""Tokens that an answer's cache begins with; room for more is made as they come."""


@dataclass(frozen=True)
class Manner:
    """How answers begin.

    As by transformers' own generation the checkpoint's settings force the first token (a language's) and leave out
    single tokens (padding), some at first alone; see `stages.serving.artifact_files.unfollowed`.

    Attributes:
        start: the token that the decoder reads first.
        forced: the first token that it says; None for what it likes.
        left_out: tokens that it never says.
        wraps: where the decoder is asked for a text itself, it reads the text's last token first, not `start`.
        left_out_first: tokens that it does not say first, where none is forced.
    """

    start: int
    forced: int | None
    left_out: tuple[int, ...]
    wraps: bool
    left_out_first: tuple[int, ...] = ()

    def shifted(self, ids_NT: NDArray[np.int64], counts_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the decoder reads when it is asked for texts, right-padded, of which so many tokens count."""
        first_N1 = ids_NT[np.arange(len(ids_NT)), counts_N - 1][:, None]
        return np.concatenate([first_N1 if self.wraps else np.full_like(first_N1, self.start), ids_NT[:, :-1]], axis=1)

    def allowed(self, logits_NV: NDArray[np.float32], *, first: bool) -> NDArray[np.float32]:
        """What comes next, but for what is never said there; in place."""
        if first and self.forced is not None:
            logits_NV[:] = NEVER
            logits_NV[:, self.forced] = 0
        else:
            out = [*self.left_out, *(self.left_out_first if first else ())]
            # Settings name tokens that a model has no logit of: -1 for none, or those of a larger table.
            logits_NV[:, [one for one in out if 0 <= one < logits_NV.shape[1]]] = NEVER
        return logits_NV


def manner(described: Mapping[str, Any]) -> Manner:
    """As `graph.json` and `engine.json` say it.

    Raises:
        StageError: they say something else.
    """
    try:
        first = tuple(described.get("left_out_first", ()))
        return Manner(**{**described, "left_out": tuple(described["left_out"]), "left_out_first": first})
    except (TypeError, KeyError) as error:
        raise StageError(
            "it is not said how answers begin",
            measured=f"answers: {described!r:.200}",
            limit="start, forced, left_out, left_out_first and wraps",
            remedy="Make the artifact again.",
        ) from error


class Answering:
    """See `stages.adapters.backends.Steps`: prompts are what the encoder reads; the decoder says what comes next.

    Args:
        stacks: both.
        how: answers begin.
        scores: it is told by log-probabilities, of all tokens together: those that are left out take theirs along.
    """

    def __init__(self, stacks: Stacks, how: Manner, *, scores: bool = False) -> None:
        self.stacks, self.how, self.scores = stacks, how, scores
        self._begun: Begun | None = None

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Steps. The encoder counts positions from the first column, so that its rows are padded behind."""
        rows = [ids_T[mask_T > 0].tolist() for ids_T, mask_T in zip(ids_NT, mask_NT, strict=True)]
        self._begun = self.stacks.begin(*padded(rows), ROOM)
        return self._read(np.full(len(rows), self.how.start, dtype=np.int64), first=True)

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Steps."""
        return self._read(tokens_N, first=False)

    def _read(self, tokens_N: NDArray[np.int64], *, first: bool) -> NDArray[np.float32]:
        assert self._begun is not None
        logits_NV = self._begun.read(tokens_N[:, None])[:, -1].copy()
        if self.scores:
            logits_NV = log_probabilities(logits_NV)
        return self.how.allowed(logits_NV, first=first)

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """See Steps."""
        assert self._begun is not None
        self._begun.reorder(rows_N)


class AnsweringRows:
    """See `stages.adapters.backends.Slots`: prompts are what the encoder reads, and none is said beside them at first.

    Args:
        slots: of both stacks.
        how: answers begin.
    """

    def __init__(self, slots: Slots, how: Manner) -> None:
        self._slots, self.how, self.leave = slots, how, slots.leave

    def admit(self, ids_T: NDArray[np.int64], said_T: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See Slots."""
        said = [] if said_T is None else said_T.tolist()
        logits_V = self._slots.admit(ids_T, np.array([self.how.start, *said], np.int64))
        return self.how.allowed(logits_V[None].copy(), first=not said)[0]

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Slots."""
        return self.how.allowed(self._slots.next(tokens_N).copy(), first=False)


def rows_apart(begin: Callable[[], Slots] | None, described: Mapping[str, Any]) -> Callable[[], Slots] | None:
    """Sequences that come and go, of both stacks; None of graphs whose rows are all on one step.

    Args:
        begin: what has such sequences, of which the token that an answer begins behind is said, too.
        described: as `graph.json` and `engine.json` say it.
    """
    if begin is None or not (described.get("cache") or {}).get("rows_apart"):
        return None
    how = manner(described.get("answers") or {})
    return lambda: AnsweringRows(begin(), how)


def whole(stacks: Stacks, how: Manner, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
    """logits_NTV of texts that the decoder is asked for itself, each token from those before it; 0 beside them."""
    rows_NT, kept_NT = padded([ids_T[mask_T > 0].tolist() for ids_T, mask_T in zip(ids_NT, mask_NT, strict=True)])
    said_NT = how.shifted(rows_NT, kept_NT.sum(1))
    found_NTV = stacks.begin(rows_NT, kept_NT, said_NT.shape[1]).read(said_NT)
    logits_NTV = np.zeros((*ids_NT.shape, found_NTV.shape[2]), np.float32)
    logits_NTV[mask_NT > 0] = found_NTV[kept_NT > 0]
    return logits_NTV


Begin = Callable[[], Steps] | None


def asking(opened: Execution, described: Mapping[str, Any], most: int) -> tuple[Forward, Begin, Begin, int | None]:
    """How an executable is asked.

    Args:
        opened: it.
        described: as `graph.json` or `engine.json` says it.
        most: tokens that it reads.

    Returns:
        How whole sequences are answered, how what is read is kept, and the same told by log-probabilities; the token
        that a decoder behind an encoder reads first.
    """
    if opened.stacks is not None:
        how = manner(described.get("answers") or {})
        begin = partial(Answering, opened.stacks, how)
        return partial(whole, opened.stacks, how), begin, partial(begin, scores=True), how.start
    assert opened.forward is not None
    steps = None if opened.steps is None else partial(opened.steps, most)
    return opened.forward, steps, scoring(steps), None
