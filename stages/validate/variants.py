"""The same items as people type them: with typing errors, in another case, with other white space.

What an answer must repeat or is chosen among is never touched, nor what stands in quotes, has digits, or is code: an
item that leaves nothing to touch has no such variant. In Chinese, which has no case and few spaces, a typing error is a
character that sounds or looks like another one, case is the width of punctuation, and white space stands behind it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from stages.measures.items import Item

_CODE = re.compile(r"[{}\[\]_;<>\\`]|\w\(|[^\W\d]\s*=|^[ \t]{2,}", re.MULTILINE)
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|「[^」\n]*」|《[^》\n]*》|(?<!\w)['\u2018][^'\u2019\n]*['\u2019](?!\w)")
_WORD = re.compile(r"[^\W_]+")
_LONG, _SHORT = 5, 2
"""Letters of a word from which on it is mistyped, and up to which its case says what it is (He, Q, Ne)."""
_WORDS_A_TYPO = 8
_SHARE_OF_SPACES = 1 / 3
_CONFUSED = dict(zip("的在再做作坐座像象已需候即未辨账", "地再在作做座坐象像以须侯既末辩帐", strict=True))
"""Characters of Chinese -> those that are typed in their place."""
_NARROW = dict(zip("，。？！：；\uff08\uff09", ",.?!:;()", strict=True))

T = TypeVar("T")
Draws = Iterator[float]
Change = Callable[[str, list[bool], Draws], str]


def variant(item: Item, kind: str) -> Item | None:
    """An item with a prompt that is typed otherwise, always the same for the same item.

    Args:
        item: what is asked; all but its prompt stays.
        kind: `typos`, `case` or `space`.

    Returns:
        None where nothing in it can be changed so.
    """
    if _CODE.search(item.prompt):
        return None
    change = (_CHINESE if item.language == "zh" else _ENGLISH)[kind]
    prompt = change(item.prompt, _kept(item), _drawn("\0".join((kind, item.id, item.prompt))))
    return None if prompt == item.prompt else item.model_copy(update={"prompt": prompt})


def _drawn(seed: str) -> Draws:
    """Numbers from 0 to 1, the same ones for a seed wherever and whenever they are drawn."""
    for count in itertools.count():
        yield int.from_bytes(hashlib.sha256(f"{seed}\0{count}".encode()).digest()[:6]) / 2**48


def _kept(item: Item) -> list[bool]:
    """Of each character of the prompt whether it must stay."""
    said = [*item.answers, *item.choices, *(one.value for one in item.checks if isinstance(one.value, str))]
    phrases = [one.strip() for one in said if one.strip()]
    words = {word.casefold() for one in phrases for word in _WORD.findall(one)}
    kept = [False] * len(item.prompt)
    for start, end in _spans(item.prompt, phrases):
        kept[start:end] = [True] * (end - start)
    for found in _WORD.finditer(item.prompt):
        if found[0].casefold() in words or any(one.isdigit() for one in found[0]):
            kept[found.start() : found.end()] = [True] * len(found[0])
    return kept


def _spans(prompt: str, phrases: Sequence[str]) -> Iterator[tuple[int, int]]:
    yield from (found.span() for found in _QUOTED.finditer(prompt))
    for one in phrases:
        yield from (found.span() for found in re.finditer(re.escape(one), prompt, re.IGNORECASE))


def _mistyped(prompt: str, kept: list[bool], draws: Draws) -> str:
    """One typing error in eight words, in long ones that stand once: what stands twice is what is asked for."""
    words = list(_WORD.finditer(prompt))
    met = [found[0].casefold() for found in words]
    fit = [
        found
        for found, word in zip(words, met, strict=True)
        if len(word) >= _LONG
        and found[0][1:].islower()
        and word.isascii()
        and met.count(word) == 1
        and not any(kept[found.start() : found.end()])
        and found.end() < len(prompt.rstrip())
    ]
    for found in sorted(_some(fit, max(1, len(words) // _WORDS_A_TYPO), draws), key=lambda one: -one.start()):
        prompt = prompt[: found.start()] + _slip(found[0], draws) + prompt[found.end() :]
    return prompt


def _slip(word: str, draws: Draws) -> str:
    """Two neighbours change places, a letter is missing, or it is there twice; never the first and the last."""
    at, kind = 1 + int(next(draws) * (len(word) - 3)), int(next(draws) * 3)
    if kind == 0 and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if kind == 1 else word[:at] + word[at] + word[at:]


def _some(among: Sequence[T], count: int, draws: Draws) -> list[T]:
    """A few of them, each as likely."""
    left = list(among)
    return [left.pop(int(next(draws) * len(left))) for _ in range(min(count, len(left)))]


def _other_case(prompt: str, kept: list[bool], _: Draws) -> str:
    """Small letters alone, or capitals where there are but small ones. USA and NaCl are no matter of taste."""

    def changed(to: Callable[[str], str]) -> str:
        def one(found: re.Match[str]) -> str:
            word = found[0]
            fixed = len(word) <= _SHORT or not word[1:].islower() or any(kept[found.start() : found.end()])
            return word if fixed or len(to(word)) != len(word) else to(word)

        return _WORD.sub(one, prompt)

    lower = changed(str.lower)
    return lower if lower != prompt else changed(str.upper)


def _wider(prompt: str, kept: list[bool], draws: Draws) -> str:
    """Some of the spaces between words are doubled."""
    fit = [found.start() for found in re.finditer(r"(?<=\S) (?=\S)", prompt) if not kept[found.start()]]
    for at in sorted(_some(fit, max(1, int(len(fit) * _SHARE_OF_SPACES)), draws), reverse=True):
        prompt = f"{prompt[:at]} {prompt[at:]}"
    return prompt


def _confused(prompt: str, kept: list[bool], draws: Draws) -> str:
    fit = [at for at, one in enumerate(prompt) if one in _CONFUSED and not kept[at]]
    for at in _some(fit, 1, draws):
        prompt = prompt[:at] + _CONFUSED[prompt[at]] + prompt[at + 1 :]
    return prompt


def _narrow(prompt: str, kept: list[bool], _: Draws) -> str:
    return "".join(one if kept[at] else _NARROW.get(one, one) for at, one in enumerate(prompt))


def _spaced(prompt: str, kept: list[bool], draws: Draws) -> str:
    doubled = _wider(prompt, kept, draws)
    if doubled != prompt:
        return doubled
    pairs = zip(prompt, [*kept[1:], True], strict=True)
    return "".join(f"{one} " if one in _NARROW and not fixed else one for one, fixed in pairs)


_ENGLISH: dict[str, Change] = {"typos": _mistyped, "case": _other_case, "space": _wider}
_CHINESE: dict[str, Change] = {"typos": _confused, "case": _narrow, "space": _spaced}
