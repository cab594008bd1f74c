"""What is wanted beside what stands: pure functions, so that one may look before anything is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "missing"
_SHOWN = 120


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not as declared, in words that hold no secret.

    Attributes:
        what: the field, dotted; empty for the part as a whole.
        now: what stands.
        wanted: what is declared.
    """

    what: str = ""
    now: str = NOTHING
    wanted: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the server as it was found: a work pool, a secret, a deployment, ...

    Attributes:
        name: what it is called, its kind first.
        differences: empty where it is as it should be.
        make: changes what differs and nothing else.
    """

    name: str
    differences: Sequence[Difference]
    make: Callable[[], object]

    def lines(self) -> list[str]:
        """A line for each difference: what, now, wanted."""
        return [
            f"{self.name}{f', {one.what}' if one.what else ''}: {one.now} -> {one.wanted}" for one in self.differences
        ]


def compared(now: Any, wanted: Any, what: str = "") -> list[Difference]:
    """The differences of two JSON values, field by field."""
    if isinstance(now, Mapping) and isinstance(wanted, Mapping):
        return [
            difference
            for key in sorted({*now, *wanted})
            for difference in _field(now, wanted, key, f"{what}.{key}" if what else str(key))
        ]
    return [] if now == wanted else [Difference(what=what, now=shown(now), wanted=shown(wanted))]


def _field(now: Mapping[str, Any], wanted: Mapping[str, Any], key: str, what: str) -> list[Difference]:
    if key in now and key in wanted:
        return compared(now[key], wanted[key], what)
    return [
        Difference(
            what=what,
            now=shown(now[key]) if key in now else NOTHING,
            wanted=shown(wanted[key]) if key in wanted else "removed",
        )
    ]


def shown(value: Any) -> str:
    """A value in one line; who stands in an address as user and password is left out."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    text = re.sub(r"://[^/@\s]+@", "://***@", text) or '""'
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def summary(parts: Sequence[Part], *, dry: bool) -> str:
    """How many parts differ, and how many do not."""
    changed = sum(bool(one.differences) for one in parts)
    if not changed:
        return f"nothing to change: {len(parts)} as they were"
    return f"{changed} {'would change' if dry else 'changed'}, {len(parts) - changed} as they were"
