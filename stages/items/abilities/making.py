"""How the tables of this room become items: names, the place of the right choice, what else may be chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from stages.measures.items import Item

Language = Literal["en", "zh"]
Match = Literal["exact", "contains", "numeric"]


def place(text: str) -> int:
    """A number that depends on the text alone: what is drawn by it stays when other items come or go."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def answer(
    name: str, prompt: str, accepted: Sequence[str], *, match: Match = "exact", language: Language = "en"
) -> Item:
    """An item that is answered; its name begins with its ability, `capitals/france`."""
    return Item(
        id=_id(name),
        ability=_ability(name),
        language=language,
        task="answers",
        prompt=prompt,
        answers=tuple(accepted),
        match=match,
    )


def choice(name: str, prompt: str, right: str, wrong: Sequence[str], *, language: Language = "en") -> Item:
    """An item that is chosen; the right one stands at a place that its name draws."""
    identity = _id(name)
    others = list(dict.fromkeys(one for one in wrong if one != right))
    at = place(identity) % (len(others) + 1)
    return Item(
        id=identity,
        ability=_ability(name),
        language=language,
        task="choices",
        prompt=prompt,
        choices=(*others[:at], right, *others[at:]),
        right=at,
    )


def others(pool: Sequence[str], right: str, count: int, name: str) -> list[str]:
    """So many different values of a pool that are not the right one, drawn by the item's name."""
    left = sorted({*pool} - {right}, key=lambda one: place(f"{name} {one}"))
    return left[:count]


def apart(right: str, candidates: Iterable[str], count: int) -> list[str]:
    """The first so many candidates of which none begins as another one or as the right one is in whole.

    The beginning of a choice is never less likely than the choice itself, so that such a pair asks nothing.
    """
    taken: list[str] = []
    for one in candidates:
        if len(taken) < count and not any(one.startswith(had) or had.startswith(one) for had in (right, *taken)):
            taken.append(one)
    return taken


def rows(table: str) -> Iterator[list[str]]:
    """The cells of a table: one row a line, cells between bars."""
    for line in table.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


def listed(cell: str) -> list[str]:
    """The values in a cell, between slashes; none in an empty one."""
    return [one.strip() for one in cell.split("/") if one.strip()]


def turn(templates: Sequence[str], name: str) -> str:
    """One of several wordings, drawn by the item's name."""
    return templates[place(f"wording of {name}") % len(templates)]


def _id(name: str) -> str:
    return name.lower().replace(" ", "-")


def _ability(name: str) -> str:
    return name.partition("/")[0]
