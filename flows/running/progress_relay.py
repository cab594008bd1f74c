"""What a stage says in its container, carried to the run that waits for it: numbered objects in the store.

The store is the one place that both can reach, so a stage's container needs no credential of MLflow, and a run that
was started again hears everything from the beginning.
"""

from __future__ import annotations

import json
import threading
from typing import Any

from flows.prefect_api.retry import patiently
from stages.runtime.artifacts import RELAYS
from stages.runtime.contract import Progress, Unavailable
from stages.runtime.progress import forward
from stages.runtime.stores import Objects

FLUSH_S = 1.0


class Sender:
    """A `Progress` listener that writes events to the store in batches; a store that is away is tried again."""

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects, self._name = objects, name
        self._number = 0
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

    def _say(self, event: dict[str, Any]) -> None:
        with self._lock:
            if event["event"] == "advanced" and self._waiting and self._waiting[-1]["event"] == "advanced":
                self._waiting.pop()
            self._waiting.append(event)

    def _write(self) -> None:
        while not self._closed.wait(FLUSH_S):
            try:
                self._flush()
            except Unavailable:
                continue

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
                self._objects.put(_key(self._name, self._number), body, replace=True)
                self._batch = []
                self._number += 1


class Receiver:
    """Reads what a `Sender` of the same name wrote."""

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects, self._name = objects, name
        self._number = 0
        self.last: dict[str, Any] = {}

    def hear(self, progress: Progress) -> None:
        """Tell a listener everything that is new; `last` is then how the stage ended, once it did.

        Raises:
            Unavailable: the store does not answer.
        """
        while (data := self._objects.read(_key(self._name, self._number))) is not None:
            for line in data.decode().splitlines():
                event = json.loads(line)
                if not forward(event, progress):
                    self.last = event
            self._number += 1

    def forget(self) -> None:
        """Remove what was read."""
        for number in range(self._number):
            self._objects.delete(_key(self._name, number))


def _key(name: str, number: int) -> str:
    return f"{RELAYS}{name}/{number:06d}.jsonl"
