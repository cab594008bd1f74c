"""Every item of `abilities://`, in an order that stays, and what is held back for the test."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import chain

from stages.items.abilities import (
    antonyms,
    calendars,
    chinese,
    code,
    completion,
    contexts,
    elements,
    geography,
    grammar,
    instructions,
    knowledge,
    logic,
    numbers,
    relations,
    translation,
    units,
)
from stages.measures.items import Item

FAMILIES = (
    geography.countries,
    elements.elements,
    calendars.calendar_items,
    units.units,
    knowledge.knowledge,
    antonyms.antonyms,
    relations.relations,
    numbers.arithmetic,
    numbers.counting,
    contexts.contexts,
    completion.completion,
    grammar.grammar,
    logic.logic,
    code.code,
    instructions.instructions,
    translation.translation,
    chinese.chinese,
)
EVERY = 3
"""Every third item of an ability is of the split `test`."""


@cache
def shipped() -> dict[str, tuple[Item, ...]]:
    """Split -> its items. They stand in the order of their names' digests: the first few are of all abilities."""
    items = sorted(chain.from_iterable(family() for family in FAMILIES), key=_drawn)
    met: dict[str, int] = {}
    split: dict[str, list[Item]] = {"validate": [], "test": []}
    for item in items:
        met[item.ability] = met.get(item.ability, 0) + 1
        split["validate" if met[item.ability] % EVERY else "test"].append(item)
    return {name: tuple(found) for name, found in split.items()}


def _drawn(item: Item) -> str:
    return hashlib.sha256(item.id.encode()).hexdigest()
