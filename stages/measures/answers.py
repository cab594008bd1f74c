"""Whether an answer is right: what a model writes, read up to the point where that is settled.

Case, width and what stands before the first letter do not count; what is accepted must end where a word ends.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from stages.measures.items import Item

_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)")
_OPENING = re.compile(r"^[\W_]+")
_ARTICLES = ("the ", "a ", "an ")
_REPEATS = 3
_LONGEST_REPEAT = 8


def right(item: Item, text: str, *, ended: bool) -> bool | None:
    """Whether an answer to an item of `answers` is right.

    Args:
        item: its `match` says how what it accepts is looked for.
        text: what the model has written so far.
        ended: it will write no more.

    Returns:
        None where more of the text may still change it; never when it ended.
    """
    line, newline, _ = text.lstrip().partition("\n")
    ended = ended or bool(newline)
    said = normalized(line)
    if item.match == "numeric":
        return _number_is(item.answers, line, ended=ended)
    accepted = [normalized(one) for one in item.answers]
    if item.match == "contains":
        if any(_stands(one, said, at) for one in accepted for at in _places(one, said)):
            return True
        whole = ended and any(said.endswith(one) and _begins(said, len(said) - len(one)) for one in accepted)
        return whole if ended else None
    if any(_stands(one, said, 0) for one in accepted) or (ended and said in accepted):
        return True
    return None if not ended and any(_may_become(said, one) for one in accepted) else False


def normalized(text: str) -> str:
    """A text as answers are compared: one case and width, single spaces, nothing before the first letter or digit."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = _OPENING.sub("", re.sub(r"\s+", " ", plain))
    article = next((one for one in _ARTICLES if plain.startswith(one)), "")
    return plain[len(article) :]


def repeats(tokens: Sequence[int]) -> bool:
    """Whether a sequence ends in the same few tokens, again and again: three times, and six tokens in all at least."""
    for length in range(1, _LONGEST_REPEAT + 1):
        times = max(_REPEATS, math.ceil(6 / length))
        tail = list(tokens[-length * times :])
        if len(tail) == length * times and tail == tail[:length] * times:
            return True
    return False


def _number_is(answers: Sequence[str], line: str, *, ended: bool) -> bool | None:
    plain = unicodedata.normalize("NFKC", line)
    found = _NUMBER.search(plain)
    if found is None or (not ended and found.end() >= len(plain.rstrip(",."))):
        return False if ended else None  # more digits may come
    return _value(found.group()) in [_value(one) for one in answers]


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("\u2212", "-"))


def _places(accepted: str, said: str) -> list[int]:
    return [found.start() for found in re.finditer(re.escape(accepted), said) if _begins(said, found.start())]


def _begins(said: str, at: int) -> bool:
    return at == 0 or not (_joins(said[at - 1]) and _joins(said[at]))


def _stands(accepted: str, said: str, at: int) -> bool:
    """Whether it stands there and has ended: what comes next belongs to no word of it."""
    end = at + len(accepted)
    return said.startswith(accepted, at) and end < len(said) and not (_joins(said[end]) and _joins(accepted[-1]))


def _joins(character: str) -> bool:
    """Whether a character makes one word with its like; those of scripts without spaces do not."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in ("W", "F")


def _may_become(said: str, accepted: str) -> bool:
    return accepted.startswith(said) or any(one.startswith(said) for one in _ARTICLES)
