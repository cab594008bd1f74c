"""Whether an answer does what it was told: checks that need no other model to judge.

Source: Zhou et al., Instruction-Following Evaluation for Large Language Models, 2023, whose kind of check this is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping

from stages.measures.items import Item


def followed(item: Item, text: str) -> bool:
    """Whether an answer holds every check of an item of `instructions`; an empty answer holds none."""
    said = text.strip()
    return bool(said) and all(_CHECKS[one.demand](said, one.value) for one in item.checks)


def units(text: str) -> int:
    """Words of a text; of scripts without spaces each character is one."""
    wide = sum(_wide(one) for one in text)
    return wide + len(re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", "".join(" " if _wide(one) else one for one in text)))


def _wide(character: str) -> bool:
    return character.isalpha() and unicodedata.east_asian_width(character) in ("W", "F")


def _language(said: str, value: object) -> bool:
    letters = [one for one in said if one.isalpha()]
    wide = sum(_wide(one) for one in letters)
    # A character of Chinese says about as much as two letters and more.
    return bool(letters) and (2 * wide > len(letters) - wide) == (value == "zh")


def _case(said: str, value: object) -> bool:
    return said.isupper() if value == "upper" else said.islower()


def _json(said: str, _: object) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", said, re.DOTALL)
    try:
        return isinstance(json.loads(fenced[1] if fenced else said), dict | list)
    except ValueError:
        return False


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _folded(text: object) -> str:
    return unicodedata.normalize("NFKC", str(text)).casefold()


_CHECKS: Mapping[str, Callable[[str, int | str | None], bool]] = {
    "words_at_most": lambda said, value: units(said) <= _number(value),
    "words_at_least": lambda said, value: units(said) >= _number(value),
    "lines": lambda said, value: len([one for one in said.splitlines() if one.strip()]) == _number(value),
    "contains": lambda said, value: _folded(value) in _folded(said),
    "omits": lambda said, value: _folded(value) not in _folded(said),
    "starts_with": lambda said, value: _folded(said).startswith(_folded(value)),
    "ends_with": lambda said, value: _folded(said).endswith(_folded(value)),
    "case": _case,
    "json": _json,
    "language": _language,
}
