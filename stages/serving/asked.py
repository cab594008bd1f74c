"""A prompt that is being answered, and who hears of it.

Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from stages.serving.sampling import Drawing
from stages.serving.writing import Answer, Writing

Heard = str | Answer | Exception
"""A piece of an answer; the answer, which is the last; or what broke it."""
Hear = Callable[[int, Heard], None]
"""(number of the prompt among those asked together, what is heard of it), called by the engine's thread."""


class Asked:
    """A prompt that is being answered.

    Attributes:
        all: tokens of the prompt and of the answer so far.
        new: those of the answer.
        gone: nobody listens any more.
        since: when the last token was said, or the prompt asked.
    """

    def __init__(
        self, ids: list[int], drawing: Drawing, most: int, writing: Writing, hear: Callable[[Heard], None], pieces: bool
    ) -> None:
        self.prompt_tokens, self.all, self.new = len(ids), [*ids], list[int]()
        self.drawing, self.most, self.writing = drawing, most, writing
        self.hear, self.pieces, self.gone, self.since = hear, pieces, False, time.monotonic()

    def leave(self) -> None:
        """Nobody listens any more: its row is free before the next step. From any thread, also when it has ended."""
        self.gone = True

    def tell(self, heard: Heard) -> None:
        """Say it to who listens, if anyone still does."""
        try:
            self.hear(heard)
        except Exception:  # noqa: BLE001 - who cannot hear has gone, and takes nobody with him
            self.gone = True


class Watch(Protocol):
    """Hears what is measured, by the engine's thread."""

    def read(self, tokens: int) -> None:
        """A prompt of so many tokens was read."""

    def said(self, seconds: float, first: bool) -> None:
        """A token was said, so long after the one before it, or after the prompt was asked."""

    def ended(self, how: str) -> None:
        """A prompt's answer ended: `stop`, `length`, `gone` or `failed`."""


class Unwatched:
    """Nothing is measured."""

    def read(self, tokens: int) -> None:
        """See Watch."""

    def said(self, seconds: float, first: bool) -> None:
        """See Watch."""

    def ended(self, how: str) -> None:
        """See Watch."""
