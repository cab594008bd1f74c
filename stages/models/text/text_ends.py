"""What a tokenizer puts before a text, between two, and behind: found by asking it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from transformers import PreTrainedTokenizerBase

from stages.runtime.contract import StageError

_WORDS = ("the", "a", "0")
"""Asked in turn, then the vocabulary's own: one that knows no character of a word may say nothing."""


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after every text, found by asking it.

    Returns:
        ids before and ids after; both empty for a tokenizer that adds nothing.
    """
    word, bare = known_word(tokenizer)
    whole = list(tokenizer(word)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise StageError(
        "the tokenizer writes a word otherwise where it adds special tokens",
        measured=f"{whole} for {word!r}",
        limit=f"{bare} within",
        remedy="Take a checkpoint whose tokenizer adds special tokens around a text only.",
    )


def pair_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """The ids that a tokenizer puts before, between and behind two texts, found by asking it."""
    word, bare = known_word(tokenizer)
    whole = list(tokenizer(word, word)["input_ids"])
    places = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    if len(places) < 2:
        raise StageError(
            "the tokenizer does not write a question and its context behind each other",
            measured=f"{whole} for {word!r} and {word!r}",
            limit=f"{bare} twice within",
            remedy="Give the checkpoint's own tokenizer.json, which says how two texts are written.",
        )
    first, last = places[0], places[-1]
    return whole[:first], whole[first + len(bare) : last], whole[last + len(bare) :]


def known_word(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A word of which the tokenizer leaves something, and that."""
    for word in chain(_WORDS, _own_words(tokenizer)):
        bare = list(tokenizer(word, add_special_tokens=False)["input_ids"])
        if bare:
            break
    return word, bare


def _own_words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    special = set(tokenizer.all_special_ids)
    for one in range(len(tokenizer)):
        if one not in special:
            yield str(tokenizer.decode([one]))
