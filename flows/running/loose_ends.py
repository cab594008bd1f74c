"""What breaks after a run's result stands: it is told, with its remedy, and ends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flows.running.run_records import Record


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

    def tell(self, error: Exception, what: str, remedy: str, *, stands: bool = True) -> None:
        """Tell of an error: what did not come about, how to get it all the same, and whether a result stands."""
        named = f"{type(error).__name__}: {error}"
        # Where neither the log nor the terminal takes the line, nobody is left to be told.
        with suppress(Exception):
            self.record.log({"event": "loose end", "what": what, "error": named, "remedy": remedy})
        result = "; the run's result stands" if stands else ""
        self.heard(f"{what} did not come about ({named}){result}. {remedy}")

    @contextmanager
    def told(self, what: str, remedy: str) -> Iterator[None]:
        """Tell of what breaks inside and go on. Only after the result stands."""
        try:
            yield
        # Any error: a promoted model is served whatever becomes of a report's copy, and a run that called itself
        # failed for such a thing would send people to look for a model that they have.
        except Exception as error:  # noqa: BLE001
            self.tell(error, what, remedy)
