"""Threads that do one call at a time in an order that is given: any interleaving, and the same each time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

CALLS = ("stat", "read", "put", "put_file", "move", "delete", "list")
APART = ("parts/", "relays/")
"""Keys in which the actors never meet."""


class Killed(BaseException):
    """Ends an actor in the middle of what it does."""


class Actor(threading.Thread):
    """A thread that waits before each of its calls until it is told to go on."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._do, self._go, self._paused = do, threading.Semaphore(0), threading.Semaphore(0)
        self._kill, self.ended, self.killed = False, False, False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.pause()
            self._do()
        except Killed:
            self.killed = True
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the actors were started
            self.error = error
        finally:
            self.ended = True
            self._paused.release()

    def pause(self) -> None:
        self._paused.release()
        self._go.acquire()
        if self._kill:
            raise Killed

    def step(self, *, kill: bool = False) -> None:
        """Let it do one call."""
        if not self.ended:
            self._kill = kill
            self._go.release()
            assert self._paused.acquire(timeout=60)


def pause() -> None:
    """Called before each call; threads that are no actors go on."""
    actor = threading.current_thread()
    if isinstance(actor, Actor):
        actor.pause()


class Paused:
    """Objects whose every call is one of an actor's steps."""

    def __init__(self, objects: Any) -> None:
        self._objects = objects

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._objects, name)
        if name not in CALLS:
            return found

        def call(*given: Any, **named: Any) -> Any:
            if not given[0].startswith(APART):
                pause()
            answer = found(*given, **named)
            return list(answer) if name == "list" else answer

        return call


def interleave(order: Iterable[tuple[int, int]], *does: Callable[[], object], dies: int | None = None) -> list[Actor]:
    """Run functions as actors: each (actor, steps) of the order in turn, and whatever is left in the end.

    The actor numbered `dies` is killed where it would go on after the order.
    """
    actors = [Actor(do) for do in does]
    for actor in actors:
        actor.start()
        assert actor._paused.acquire(timeout=60)
    for number, steps in order:
        for _ in range(steps):
            actors[number].step()
    if dies is not None:
        actors[dies].step(kill=True)
    for actor in actors:
        while not actor.ended:
            actor.step()
        actor.join()
        if actor.error:
            raise actor.error
    return actors
