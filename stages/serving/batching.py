"""Many prompts answered at once by one engine: each takes a row when one is free, and gives it back when it has ended.

One thread owns the engine. Between two steps it frees the rows of those who have ended or gone, and reads the prompts
of those who wait; a step then writes a token of every row. What is drawn of a row depends on that row alone.

Shapes: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Slots
from stages.runtime.contract import StageError, Unavailable
from stages.serving.asked import Asked, Hear, Unwatched, Watch
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS
from stages.serving.generation import Generation
from stages.serving.inputs import Prompt
from stages.serving.rows import rows_of
from stages.serving.sampling import Drawing
from stages.serving.writing import Answer, Writing

WAITING = 64
"""Prompts that wait for a row at most, where nobody says how many."""


class Full(Unavailable):
    """As many prompts wait as may: later there may be room."""


class Closed(Unavailable):
    """Nothing is answered any more."""


class Batching:
    """Answers prompts from any number of threads.

    Args:
        model: continues texts.
        rows: that are written at once at most.
        waiting: prompts that wait for a row at most.
        watch: hears what is measured.
    """

    def __init__(
        self, model: Answerer, *, rows: int = ROWS, waiting: int = WAITING, watch: Watch | None = None
    ) -> None:
        self.model, self.most_rows, self.most_waiting = model, rows, waiting
        self._watch = watch or Unwatched()
        self._slots: Slots | None = None
        # What an encoder reads stands apart from what is said to it.
        self._stacked = model.task == "translate"
        self._turn, self._waiting, self._rows = threading.Condition(), deque[Asked](), list[Asked]()
        self._ends_at: float | None = None
        self._beginning = 0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Rows that are written."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Prompts that wait for a row."""
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._ends_at is not None

    def ask(self, prompts: Sequence[Prompt], how: Generation, hear: Hear, *, pieces: bool = False) -> list[Asked]:
        """Have prompts answered; returns at once.

        Args:
            prompts: as `Answerer.generate` takes them; all of them wait, or none.
            how: they are continued; the settings' beams are not followed.
            hear: what is heard of them.
            pieces: answers are heard in pieces, too.

        Raises:
            StageError: as of `Answerer.generate`, they are more than can ever wait, or asked for by beams.
            Full: there is no room for them now.
            Closed: nothing is answered any more.
        """
        if len(prompts) > self.most_waiting + self.most_rows:
            raise StageError(
                "more prompts are asked at once than may be written and wait",
                measured=len(prompts),
                limit=self.most_waiting + self.most_rows,
                remedy="Ask some after the others.",
            )
        if (how.beams or 1) > 1:
            raise StageError(
                "rows are written a token at a time, and beams are not",
                measured=f"{how.beams} beams",
                limit="1",
                remedy="Ask the model itself: `enginery generate`, or where it is registered.",
            )
        most, encoded = self.model.admitted(prompts, how)
        texts = [Writing(self.model.tokenizer, how.stop) for _ in encoded]
        made = [
            Asked(ids, Drawing(how, 1, self.model.rules), most, text, partial(hear, at), pieces)
            for at, (ids, text) in enumerate(zip(encoded, texts, strict=True))
        ]
        with self._turn:
            if self.closed:
                raise Closed("the server is being stopped", remedy="Ask again when it is back.")
            self._forget_gone()
            # Who finds a free row waits for no more than the step that is being made.
            free = max(0, self.most_rows - len(self._rows) - self._beginning)
            if len(self._waiting) + len(made) > self.most_waiting + free:
                raise Full(
                    "too many prompts wait already",
                    measured=len(self._waiting),
                    limit=self.most_waiting,
                    remedy="Ask again in a moment.",
                )
            self._waiting.extend(made)
            self._turn.notify()
        return made

    def close(self, within_s: float = 0.0) -> None:
        """Take nothing more, and end what is being answered after so long at the latest; returns at once."""
        with self._turn:
            self._ends_at = time.monotonic() + within_s
            self._turn.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the engine's thread after `close`; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            if (one := self._next()) is not None:
                self._begin(one)
                self._beginning = 0
            elif self._rows:
                self._step()
            else:
                return

    def _next(self) -> Asked | None:
        """Who gets a row now; waits while there is nothing to do at all."""
        with self._turn:
            while True:
                if self._ends_at is not None:
                    self._end_by(self._ends_at)
                self._forget_gone()
                if self._waiting and len(self._rows) < self.most_rows:
                    self._beginning = 1
                    return self._waiting.popleft()
                if self._rows or self.closed:
                    return None
                self._turn.wait()

    def _end_by(self, time_s: float) -> None:
        """End who waits, and once it is time who is written; the queue is held."""
        broken = Closed("the server was stopped before the answer had ended", remedy="Ask again when it is back.")
        while self._rows and time.monotonic() >= time_s:
            self._ended(self._left(len(self._rows) - 1), broken)
        while self._waiting:
            self._ended(self._waiting.popleft(), broken)

    def _forget_gone(self) -> None:
        """Free the places in the queue of those who have gone; the queue is held."""
        for one in [one for one in self._waiting if one.gone]:
            self._waiting.remove(one)
            self._watch.ended("gone")

    def _begin(self, one: Asked) -> None:
        """Read a prompt, and what was said to it, into a row, and say a token."""
        try:
            if not self.model.goes_on(one.prompt_tokens, one.new, one.writing, one.most):
                self._ended(one, self.model.answer(one.prompt_tokens, one.new, one.writing))
                return
            if self._slots is None:
                self._slots = rows_of(self.model)
            logits_V = self._admitted(one, self._slots)
        except Exception as error:  # noqa: BLE001 - whatever one prompt breaks, others are answered
            self._ended(one, error)
            return
        if not one.new:
            self._watch.read(one.prompt_tokens)
        self._rows.append(one)
        self._say(len(self._rows) - 1, logits_V)

    def _admitted(self, one: Asked, slots: Slots) -> NDArray[np.float32]:
        if not self._stacked:
            return slots.admit(np.array(one.all, np.int64))
        return slots.admit(np.array(one.all[: one.prompt_tokens], np.int64), np.array(one.new, np.int64))

    def _step(self) -> None:
        """A token of each row."""
        for one in [one for one in self._rows if one.gone]:
            if one in self._rows:
                self._left(self._rows.index(one))
                self._watch.ended("gone")
        if not self._rows or self._slots is None:
            return
        try:
            logits_NV = self._slots.next(np.array([one.new[-1] for one in self._rows], np.int64))
        except Exception:  # noqa: BLE001 - nobody knows which row it was: who breaks it again by itself is told
            self._put_back()
            return
        for row in reversed(range(len(self._rows))):  # the last row takes the place of one that ends
            if self._slots is not None:
                self._say(row, logits_NV[row])

    def _say(self, row: int, logits_V: NDArray[np.float32]) -> None:
        """Draw a row's next token, and tell of it."""
        one = self._rows[row]
        try:
            seen = self.model.seen(one.all[: one.prompt_tokens], one.new)
            token = one.drawing(0, seen, logits_V, len(one.new))
            one.new.append(token)
            one.all.append(token)
            now, first = time.monotonic(), len(one.new) == 1
            self._watch.said(now - one.since, first)
            one.since = now
            if one.pieces and (piece := one.writing.piece(one.new)):
                one.tell(piece)
            if self.model.goes_on(one.prompt_tokens, one.new, one.writing, one.most):
                return
            if one.pieces and (piece := one.writing.piece(one.new, last=True)):
                one.tell(piece)
            last: Answer | Exception = self.model.answer(one.prompt_tokens, one.new, one.writing)
        except Exception as error:  # noqa: BLE001 - whatever one row breaks, others are written
            last = error
        self._left(row)
        self._ended(one, last)

    def _left(self, row: int) -> Asked:
        """Free a row; who had it."""
        one = self._rows[row]
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        try:
            if self._slots is not None:
                self._slots.leave(row)
        except Exception:  # noqa: BLE001 - the others are read anew
            self._put_back()
        return one

    def _put_back(self) -> None:
        """Have all rows read anew, before anyone else: what they had read is lost."""
        with self._turn:
            self._waiting.extendleft(reversed(self._rows))
        self._rows, self._slots = [], None

    def _ended(self, one: Asked, last: Answer | Exception) -> None:
        one.tell(last)
        self._watch.ended(last.finish if isinstance(last, Answer) else "failed")
