"""What a stage says in its container, carried to the run that waits for it: numbered objects in the store.

The store is the one place that both can reach, so a stage's container needs no credential of MLflow, and a run that
was started again hears everything from the beginning. Each start of a container numbers itself: what one said that was
lost is not taken for the next one's. Its pulse goes on while Prefect's API is away.
"""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any

from flows.prefect_api.retry import patiently
from stages.runtime.artifacts import RELAYS
from stages.runtime.contract import Frozen, Progress, StageError, Unavailable
from stages.runtime.patience import waiting
from stages.runtime.progress import forward
from stages.runtime.stores import Objects

FLUSH_S = 1.0
BEAT_S = 15.0
"""How often a container says that it lives."""
LOOK_S = 5.0
"""How often that is read."""


class _Pulse(Frozen):
    """The newest start of a container, how often it said that it lives, and how many batches of words it has sent."""

    start: int = 0
    beat: int = 0
    sent: int = 0


class Sender:
    """A `Progress` listener that writes events to the store in batches; a store that is away is tried again.

    Raises:
        Unavailable: the store does not answer for too long.
    """

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects, self._name = objects, name
        self._start = patiently(self._begun)
        self._number = self._beats = 0
        self._waiting: list[dict[str, Any]] = []
        self._batch: list[dict[str, Any]] = []
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write, name="relay", daemon=True)
        self._writer.start()

    def advanced(self, done: float, total: float) -> None:
        """See Progress. Only the last state counts."""
        self._say({"event": "advanced", "done": done, "total": total})

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""
        self._say({"event": "metric", "name": name, "value": value, "step": step})

    def note(self, text: str) -> None:
        """See Progress."""
        self._say({"event": "note", "text": text})

    def end(self, last: dict[str, Any]) -> None:
        """Say how the stage ended, and send everything, however long the store is away within reason.

        Raises:
            Unavailable: the store stayed away.
        """
        self._closed.set()
        self._writer.join()
        self._say(last)
        patiently(self._flush)

    def _begun(self) -> int:
        """The number of this start, which no other has."""
        start = _pulse(self._objects, self._name).start + 1
        while not self._objects.put(f"{_room(self._name, start)}begun", b"{}"):
            start += 1
        return start

    def _say(self, event: dict[str, Any]) -> None:
        with self._lock:
            if event["event"] == "advanced" and self._waiting and self._waiting[-1]["event"] == "advanced":
                self._waiting.pop()
            self._waiting.append(event)

    def _write(self) -> None:
        beaten = -math.inf
        while True:
            try:
                with waiting(0.0):
                    self._flush()
                    if time.monotonic() - beaten >= BEAT_S:
                        self._beat()
                        beaten = time.monotonic()
            except (StageError, OSError):
                pass  # the next round says it; `end` raises what stays wrong
            if self._closed.wait(FLUSH_S):
                return

    def _beat(self) -> None:
        self._beats += 1
        pulse = _Pulse(start=self._start, beat=self._beats, sent=self._number)
        self._objects.put(_pulse_key(self._name), pulse.model_dump_json().encode(), replace=True)

    def _flush(self) -> None:
        with self._sending:
            while True:
                if not self._batch:
                    with self._lock:
                        self._batch, self._waiting = self._waiting, []
                if not self._batch:
                    return
                # Kept as it is until it is known to stand: who reads may have it although the answer was lost.
                body = "\n".join(json.dumps(event) for event in self._batch).encode()
                self._objects.put(_batch_key(self._name, self._start, self._number), body, replace=True)
                self._batch = []
                self._number += 1


class Receiver:
    """Reads what the newest `Sender` of the same name wrote, and whether it lives.

    Attributes:
        last: how its stage ended, empty before.
        silent_s: how long no beat has come, on this machine's clock and only while the store answered; None before the
            first.
    """

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects, self._name = objects, name
        self._pulse = _Pulse()
        self._number = 0
        self._looked, self._beaten = -math.inf, math.inf
        self.last: dict[str, Any] = {}

    @property
    def silent_s(self) -> float | None:
        """See the class."""
        return None if math.isinf(self._beaten) else time.monotonic() - self._beaten

    def hear(self, progress: Progress, *, anew: bool = False) -> None:
        """Tell a listener everything that is new.

        Args:
            progress: who listens.
            anew: look at once whether another start speaks now.

        Raises:
            Unavailable: the store does not answer.
        """
        try:
            self._look(anew)
            self._read(progress)
        except Unavailable:
            if not math.isinf(self._beaten):
                self._beaten = time.monotonic()  # a container may not have reached it either
            raise

    def forget(self) -> None:
        """Remove what was said."""
        for found in list(self._objects.list(f"{RELAYS}{self._name}/")):
            self._objects.delete(found.key)

    def _look(self, anew: bool) -> None:
        now = time.monotonic()
        if self._pulse.start and not anew and now - self._looked < LOOK_S:
            return
        found = _pulse(self._objects, self._name)
        self._looked = now
        if found.start < self._pulse.start or found == self._pulse:
            return
        if found.start > self._pulse.start:
            self._number, self.last = 0, {}
        self._pulse, self._beaten = found, time.monotonic()

    def _read(self, progress: Progress) -> None:
        while self._pulse.start:
            data = self._objects.read(_batch_key(self._name, self._pulse.start, self._number))
            if data is None and self._number >= self._pulse.sent:
                return
            for line in data.splitlines() if data else ():  # a batch that was sent and is gone was swept
                event = json.loads(line)
                if not forward(event, progress):
                    self.last = event
            self._number += 1


def _pulse(objects: Objects, name: str) -> _Pulse:
    data = objects.read(_pulse_key(name))
    return _Pulse.model_validate_json(data) if data else _Pulse()


def _room(name: str, start: int) -> str:
    return f"{RELAYS}{name}/{start:04d}/"


def _pulse_key(name: str) -> str:
    return f"{RELAYS}{name}/pulse.json"


def _batch_key(name: str, start: int, number: int) -> str:
    return f"{_room(name, start)}{number:06d}.jsonl"
