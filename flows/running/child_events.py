"""What a stage's child says: read as it comes and kept, so that a listener that takes its time stalls no stage."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from typing import IO, Any

from flows.running.process_group import ProcessGroup
from stages.runtime.contract import Progress
from stages.runtime.progress import forward

Event = dict[str, Any]

MALFORMED = "malformed"
"""The event that stands for a line which is none; its `line` has the text."""
_PARTS = {
    "advanced": {"done", "total"},
    "metric": {"name", "value", "step"},
    "note": {"text"},
    "sealed": {"identity", "cached", "changed"},
    "part": {"start", "stop"},
    "units": {"count"},
    "error": {"kind", "what"},
}
_LOOK_S = 0.5
_DRAINED_S = 1.0
"""For what a child's end left in the pipe, where a process that left its group still holds the other end."""


class Events:
    """The events of a stream, read by a thread of its own. Of advances in a row only the last is kept."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._ended = False
        # Not waited for: it ends with the stream, which closes with the last process that holds it.
        threading.Thread(target=self._read, args=(stream,), name="child's events", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether everything was taken and nothing will come."""
        with self._changed:
            return self._ended and not self._waiting

    def take(self, seconds: float) -> Event | None:
        """The next event; None where none came in that time or the stream ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended, seconds)
            return self._waiting.popleft() if self._waiting else None

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                if line.endswith(b"\n"):  # else its writer was killed amid it
                    self._add(_understood(line))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _add(self, event: Event) -> None:
        with self._changed:
            if event["event"] == "advanced" and self._waiting and self._waiting[-1]["event"] == "advanced":
                self._waiting.pop()
            self._waiting.append(event)
            self._changed.notify_all()


def hear(child: ProcessGroup, progress: Progress) -> Event:
    """Tell a listener, in this thread, what a child says; returns its last event, empty where it ended without one.

    A line that is no event is a last one, too, of the kind MALFORMED.
    """
    events, silent_at = Events(child.said), math.inf
    while True:
        event = events.take(_LOOK_S)
        if event is not None:
            if event["event"] == MALFORMED or not forward(event, progress):
                return event
        elif events.ended or time.monotonic() > silent_at:
            return {}
        elif child.poll() is not None:
            silent_at = min(silent_at, time.monotonic() + _DRAINED_S)


def _understood(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:  # neither JSON nor UTF-8
        event = None
    if isinstance(event, dict) and _PARTS.get(str(event.get("event")), {""}) <= event.keys():
        return event
    return {"event": MALFORMED, "line": line.decode(errors="replace").rstrip("\n")}
