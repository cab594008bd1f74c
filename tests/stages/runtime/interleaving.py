"""Threads that do one call at a time, in an order that is drawn beforehand: any interleaving, and the same each time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

CALLS = ("stat", "read", "put", "put_file", "move", "delete", "list", "sweep_uploads")


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
        except BaseException as error:
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
            pause()
            answer = found(*given, **named)
            return list(answer) if name == "list" else answer

        return call


def interleave(drawn: random.Random, *does: Callable[[], object], may_die: int | None = None) -> list[Actor]:
    """Run functions as actors until all have ended; at a drawn moment the one numbered `may_die` is killed."""
    actors = [Actor(do) for do in does]
    for actor in actors:
        actor.start()
        assert actor._paused.acquire(timeout=60)
    deadly = drawn.randrange(1, 16) if may_die is not None else -1
    # Runs of steps by one actor are as likely as single ones: a whole publication between two calls of a sweep.
    steps = [0] * len(actors)
    while alive := [number for number, actor in enumerate(actors) if not actor.ended]:
        number = drawn.choice(alive)
        for _ in range(drawn.choice((1, 1, 2, 3, 5, 9, 20))):
            steps[number] += 1
            actors[number].step(kill=number == may_die and steps[number] == deadly)
    for actor in actors:
        actor.join()
        if actor.error:
            raise actor.error
    return actors
