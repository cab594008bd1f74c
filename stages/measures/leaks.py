"""Items that stand in a text with what is right about them: who reads that text has been told the answers.

Case, white space and punctuation play no part. One pass over the text looks up its runs of three words among those
that the items end in, so that nothing is compared but where an item may end.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stages.measures.items import Item

SHINGLE_WORDS = 3
SHORT_WORDS = 8
"""An item of fewer words leaks only where it stands whole: two of its three words in common say too little."""
NEAR = 0.8
"""From this share of a longer item's word runs on, a text holds something like it."""
_AROUND = 2
"""A near duplicate is looked for in so many times an item's words before its end."""

# A Han character is a word of its own. Signs of arithmetic are words: else 1 + 2 = 3 would be 1, 2, 3. Of a minus that
# holds unless it is a hyphen.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[+*/=<>%]|(?<![^\s\d])-(?=[\s\d])")

Words = tuple[str, ...]


@dataclass(frozen=True)
class _Sought:
    """An item with one of its right answers, as words."""

    item: str
    words: Words
    shingles: frozenset[Words]


def words_of(text: str) -> list[str]:
    """The words of a text as leaks compare them."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def leaks(items: Iterable[Item], passages: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which items stand in which passages: their prompt with a right answer, or nearly so.

    Args:
        items: what must not be known beforehand. An item that has fewer than three words with its answer is not sought:
            it stands everywhere.
        passages: (id, text) of each.

    Returns:
        (id of the item, id of the passage), each pair once: in the order of the passages, then by id.
    """
    sought = _by_ending(items)
    found = []
    for name, text in passages:
        words = words_of(text)
        here: set[str] = set()
        for end, run in enumerate(zip(words, words[1:], words[2:], strict=False), SHINGLE_WORDS):
            if run in sought:
                here.update(one.item for one in sought[run] if one.item not in here and _ends_here(one, words, end))
        found += [(item, name) for item in sorted(here)]
    return found


def leaks_across(items: Sequence[Item], passages: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which items stand in no passage, but where one ends and the next begins: windows join them.

    Args:
        items: see `leaks`.
        passages: (id, text) of each, in the order in which they are read.

    Returns:
        (id of the item, id of the later passage).
    """
    alone = set(leaks(items, passages))
    before = {later: earlier for (earlier, _), (later, _) in pairwise(passages)}
    joined = ((later, f"{one} {other}") for (_, one), (later, other) in pairwise(passages))
    return [
        (item, later)
        for item, later in leaks(items, joined)
        if (item, later) not in alone and (item, before[later]) not in alone
    ]


def _by_ending(items: Iterable[Item]) -> dict[Words, list[_Sought]]:
    sought: defaultdict[Words, list[_Sought]] = defaultdict(list)
    for item in items:
        for told in _told(item):
            words = tuple(words_of(told))
            if len(words) >= SHINGLE_WORDS:
                sought[words[-SHINGLE_WORDS:]].append(_Sought(item.id, words, _shingles(words)))
    return sought


def _told(item: Item) -> list[str]:
    """What an item says with each of its right answers; an instruction is itself what must not be met."""
    match item.task:
        case "answers" | "question" | "translate" | "summarize":
            return [f"{item.prompt} {one}" for one in item.answers]
        case "choices":
            return [item.prompt + item.choices[item.right]]
        case _:
            return [item.prompt]


def _ends_here(one: _Sought, words: Sequence[str], end: int) -> bool:
    """Whether an item ends where its last words stand in a text: whole, or with most of its word runs before."""
    length = len(one.words)
    if tuple(words[max(end - length, 0) : end]) == one.words:
        return True
    if length < SHORT_WORDS:
        return False
    before = _shingles(words[max(end - _AROUND * length, 0) : end])
    return len(one.shingles & before) >= NEAR * len(one.shingles)


def _shingles(words: Sequence[str]) -> frozenset[Words]:
    return frozenset(zip(words, words[1:], words[2:], strict=False))
