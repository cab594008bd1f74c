"""Whether an answer is right: what a model writes, read up to the point where that is settled.

Case, width and what stands before the first letter do not count; what is accepted must end where a word ends.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

from stages.measures.items import NUMBER, Item, plain_number

_OPENING = re.compile(r"^(?:(?!-\d|(?<!\.)\.\d)[\W_])+")
"""All but the sign or the point of a number."""
_QUOTES = re.compile(r"^[\s\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb]+")
_ARTICLES = ("the ", "a ", "an ")
_ALONE = tuple(one.strip() for one in _ARTICLES)
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
    if item.match == "numeric":
        return _number_is(item.answers, line, ended=ended)
    found = [_is(read(one), read(line), item.match, ended=ended) for one in item.answers for read in _readings(one)]
    return True if True in found else None if None in found else False


def normalized(text: str) -> str:
    """A text as answers are compared: one case and width, single spaces, nothing before the first letter or number."""
    plain = _OPENING.sub("", _folded(text))
    article = next((one for one in _ARTICLES if plain.startswith(one)), "")
    return plain[len(article) :]


def _readings(accepted: str) -> list[Callable[[str], str]]:
    """As what an answer and a text are compared: a sign or an article that is all of it counts, as nowhere else."""
    if normalized(accepted):
        return [normalized, _as_it_stands] if _as_it_stands(accepted) in _ALONE else [normalized]
    return [_as_it_stands if _as_it_stands(accepted) else lambda text: _folded(text).strip()]


def _as_it_stands(text: str) -> str:
    return _QUOTES.sub("", _folded(text))


def _folded(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return re.sub(r"\s+", " ", plain)


def _is(accepted: str, said: str, match: str, *, ended: bool) -> bool | None:
    """See `right`, of a single answer."""
    if match == "contains":
        if any(_stands(accepted, said, at) for at in _places(accepted, said)):
            return True
        whole = ended and said.endswith(accepted) and _begins(said, len(said) - len(accepted))
        return whole if ended else None
    if _stands(accepted, said, 0) or (ended and said == accepted):
        return True
    return None if not ended and _may_become(said, accepted) else False


def repeats(tokens: Sequence[int]) -> bool:
    """Whether a sequence ends in the same few tokens, again and again: three times, and six tokens in all at least."""
    for length in range(1, _LONGEST_REPEAT + 1):
        times = max(_REPEATS, math.ceil(6 / length))
        tail = list(tokens[-length * times :])
        if len(tail) == length * times and tail == tail[:length] * times:
            return True
    return False


def _number_is(answers: Sequence[str], line: str, *, ended: bool) -> bool | None:
    plain = plain_number(line)
    found = NUMBER.search(plain)
    if found is None or (not ended and found.end() >= len(plain.rstrip(",."))):
        return False if ended else None  # more digits may come
    return _value(found.group()) in [_value(plain_number(one)) for one in answers]


def _value(number: str) -> float:
    return float(number.replace(",", ""))


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
