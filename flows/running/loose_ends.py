"""What breaks after a run's result stands: it is told, with its remedy, and ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from flows.running.run_records import Record

T = TypeVar("T")


@dataclass(frozen=True)
class LooseEnds:
    """Who is told of what breaks once nothing undoes a run's result, such as a promotion.

    Attributes:
        record: of the run, whose log keeps it.
        say: tells a person.
    """

    record: Record
    say: Callable[[str], None]

    def heard(self, text: str) -> None:
        """Say a line where someone hears it: a terminal that is gone breaks nothing."""
        with suppress(Exception):
            self.say(text)

    def tell(self, error: Exception, what: str, remedy: str) -> None:
        """Tell of an error: what did not come about, and how to get it all the same."""
        named = f"{type(error).__name__}: {error}"
        # Where neither the log nor the terminal takes the line, nobody is left to be told.
        with suppress(Exception):
            self.record.log({"event": "loose end", "what": what, "error": named, "remedy": remedy})
        self.heard(f"{what} did not come about ({named}); the run's result stands. {remedy}")

    @contextmanager
    def told(self, what: str, remedy: str) -> Iterator[None]:
        """Tell of what breaks inside and go on. Only after the result stands."""
        try:
            yield
        # Any error: a promoted model is served whatever becomes of a report's copy, and a run that called itself
        # failed for such a thing would send people to look for a model that they have.
        except Exception as error:  # noqa: BLE001
            self.tell(error, what, remedy)

    @contextmanager
    def closed(self, opened: AbstractContextManager[T], ended: Sized, what: str, remedy: str) -> Iterator[T]:
        """Hold something open; once `ended` has the result, its failing to close is told. The block's errors pass."""
        closing = False
        try:
            with opened as held:
                yield held
                closing = True
        except Exception as error:
            if not (closing and ended):
                raise
            self.tell(error, what, remedy)
