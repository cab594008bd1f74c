"""`enginery serve` for one client and for many at once: python -m tests.benchmarks.serving MODEL.

Each answer is held against the same prompt asked alone, of the same engine in this process. One client asks before and
after the many, so that a machine whose speed drifts speeds up neither.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from stages.serving.engine import Answerer, open_engine
from stages.serving.generation import Generation
from tests.flows.endpoint.served import serving
from tests.tiny import reference_text

CLIENTS, SECONDS, ALONE_S, PROMPTS, QUEUE = 16, 60.0, 10.0, 24, 64
LONGEST, MOST_NEW = 120, 48
"""Words of a prompt, tokens of an answer."""
WARM_S = 5.0


@dataclass(frozen=True)
class Question:
    """A prompt, how many tokens are wanted, and what the engine says to it alone."""

    prompt: str
    most: int
    answer: str


@dataclass
class Load:
    """What some clients got.

    Attributes:
        tokens: that were said to them.
        wrong: answers that differ from the one alone.
        errors: answers that were none, by status.
        seconds: that they asked.
        bytes: resident memory of the server, each half second.
    """

    tokens: int = 0
    answers: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bytes: list[int] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def questions(model: Answerer, count: int = PROMPTS) -> list[Question]:
    """Prompts of unequal length, each answered alone."""
    draw, words = random.Random(7), reference_text().split()
    made = []
    for _ in range(count):
        start = draw.randrange(len(words) - LONGEST)
        prompt = " ".join(words[start : start + draw.randint(2, LONGEST)])
        most = draw.randint(8, MOST_NEW)
        made.append(Question(prompt, most, model.answers([prompt], Generation(max_new_tokens=most))[0].text))
    return made


async def load(url: str, name: str, asked: Sequence[Question], clients: int, seconds: float, server: int) -> Load:
    """Have clients ask one question after the other."""
    found, process, began = Load(), psutil.Process(server), time.monotonic()
    until = began + seconds

    async def client(order: Iterator[Question]) -> None:
        while time.monotonic() < until:
            await _ask(http, name, next(order), found)

    async def look() -> None:
        while True:
            found.bytes.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:
        looking = asyncio.create_task(look())
        orders = [itertools.cycle([*asked[at % len(asked) :], *asked[: at % len(asked)]]) for at in range(clients)]
        await asyncio.gather(*(client(order) for order in orders))
        found.seconds = time.monotonic() - began
        looking.cancel()
    return found


async def _ask(http: httpx.AsyncClient, name: str, one: Question, found: Load) -> None:
    body = {"model": name, "prompt": one.prompt, "max_tokens": one.most, "temperature": 0}
    got = await http.post("/v1/completions", json=body)
    if got.status_code != 200:
        found.errors.append(got.status_code)
        return
    said: dict[str, Any] = got.json()
    found.answers, found.tokens = found.answers + 1, found.tokens + said["usage"]["completion_tokens"]
    if said["choices"][0]["text"] != one.answer:
        found.wrong.append((one.prompt, said["choices"][0]["text"]))


async def burst(url: str, name: str, one: Question, count: int) -> Load:
    """So many clients at the same moment, once."""
    found, began = Load(), time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        await asyncio.gather(*(_ask(http, name, one, found) for _ in range(count)))
    found.seconds = time.monotonic() - began
    return found


@dataclass(frozen=True)
class Measured:
    """One client before and after, many at once, and more than may wait."""

    alone: tuple[Load, Load]
    many: Load
    burst: Load

    @property
    def gain(self) -> float:
        """Tokens per second of many, over those of one."""
        return self.many.speed / statistics.mean(one.speed for one in self.alone)

    @property
    def growth_bytes(self) -> int:
        """Resident memory in the last third of the time over that in the first, which warms up first."""
        third = len(self.many.bytes) // 3
        return int(statistics.median(self.many.bytes[-third:]) - statistics.median(self.many.bytes[:third]))


def measure(folder: Path, *, clients: int, seconds: float, alone_s: float, rows: int) -> Measured:
    """Serve a model and ask it."""
    asked = questions(open_engine(folder, verified=True))
    with serving(folder, "--rows", rows, "--queue", QUEUE, "--name", "served") as (url, child):
        asyncio.run(load(url, "served", asked, clients, WARM_S, child.pid))
        before = asyncio.run(load(url, "served", asked, 1, alone_s, child.pid))
        many = asyncio.run(load(url, "served", asked, clients, seconds, child.pid))
        after = asyncio.run(load(url, "served", asked, 1, alone_s, child.pid))
        longest = max(asked, key=lambda one: one.most)
        beyond = asyncio.run(burst(url, "served", longest, 2 * (rows + QUEUE)))
    return Measured((before, after), many, beyond)


def told(found: Measured, clients: int) -> str:
    """The figures."""
    lines = [
        f"{what:<12}{one.answers:>8} answers{len(one.wrong):>5} other than alone{len(one.errors):>5} errors"
        f"{one.speed:>10.0f} tokens/s"
        for what, one in [
            ("1 client", found.alone[0]),
            (f"{clients} clients", found.many),
            ("1 client", found.alone[1]),
            ("a burst", found.burst),
        ]
    ]
    lines += [
        f"many over one: {found.gain:.2f}",
        f"resident memory: {found.many.bytes[0] / 1e6:.1f} MB, at most {max(found.many.bytes) / 1e6:.1f} MB, "
        f"last third over first {found.growth_bytes / 1e6:+.1f} MB",
        f"turned away in the burst: {found.burst.errors.count(429)}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="make bench-serving", description=__doc__)
    parser.add_argument("model", type=Path, help="a folder: engine, graph or checkpoint")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--alone", type=float, default=ALONE_S, help="seconds that one client asks, twice")
    parser.add_argument("--rows", type=int, default=8)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    found = measure(given.model, clients=given.clients, seconds=given.seconds, alone_s=given.alone, rows=given.rows)
    print(told(found, given.clients))  # noqa: T201


if __name__ == "__main__":
    main()
