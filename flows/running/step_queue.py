"""Which waiting step computes next: at most `count` at once, the earliest of the recipe first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Slots:
    """A semaphore that serves waiters by rank instead of by arrival.

    Two steps that share two cores are slower than one after the other, and the earliest step of a recipe is the one
    that others wait for.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: list[int] = []
        self._turn = threading.Condition()

    @contextmanager
    def take(self, rank: int, *, alone: bool = False) -> Iterator[None]:
        """Wait for a slot, or `alone` for all of them; ranks are distinct, the lowest waiting one goes first."""
        wanted = self._count if alone else 1
        with self._turn:
            heapq.heappush(self._waiting, rank)
            self._turn.wait_for(lambda: self._free >= wanted and self._waiting[0] == rank)
            heapq.heappop(self._waiting)
            self._free -= wanted
            self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self._free += wanted
                self._turn.notify_all()
