"""Listeners of a running stage: none, several, one of several passes, or JSON lines from a child to its parent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from stages.runtime.contract import Progress


class Silent:
    """Hears everything and says nothing."""

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""

    def note(self, text: str) -> None:
        """See Progress."""


@dataclass(frozen=True)
class Listeners:
    """Tells each of several listeners."""

    each: tuple[Progress, ...]

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        for one in self.each:
            one.advanced(done, total)

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""
        for one in self.each:
            one.metric(name, value, step)

    def note(self, text: str) -> None:
        """See Progress."""
        for one in self.each:
            one.note(text)


@dataclass(frozen=True)
class Pass:
    """Hears of one pass, the `place`-th of `count` from 0, and tells of all of them as one advance."""

    progress: Progress
    place: int
    count: int

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        self.progress.advanced(self.place + done / total, self.count)

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""
        self.progress.metric(name, value, step)

    def note(self, text: str) -> None:
        """See Progress."""
        self.progress.note(text)


@dataclass(frozen=True)
class JsonLines:
    """Writes each event as one JSON line; the parent process reads them with `forward`."""

    stream: TextIO

    def advanced(self, done: float, total: float) -> None:
        """See Progress."""
        self.send(event="advanced", done=done, total=total)

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""
        self.send(event="metric", name=name, value=value, step=step)

    def note(self, text: str) -> None:
        """See Progress."""
        self.send(event="note", text=text)

    def send(self, **event: Any) -> None:
        """Write one event and flush, so that a bar never lags."""
        self.stream.write(json.dumps(event) + "\n")
        self.stream.flush()


def forward(event: Mapping[str, Any], progress: Progress) -> bool:
    """Tell a listener an event that JsonLines wrote; False when it is not an event of progress."""
    match event.get("event"):
        case "advanced":
            progress.advanced(event["done"], event["total"])
        case "metric":
            progress.metric(event["name"], event["value"], event["step"])
        case "note":
            progress.note(event["text"])
        case _:
            return False
    return True
