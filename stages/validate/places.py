"""Where words, contexts and choices stand among a model's tokens.

Shapes: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.adapters.backends import TYPES
from stages.measures.items import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART_TOKENS, SHARED_TOKENS = 384, 128
"""A part of a context with its question, and what a part shares with the next: SQuAD's usual ones."""


@dataclass(frozen=True)
class Part:
    """A part of a context behind its question.

    Attributes:
        ids: all tokens.
        start: the first of the context.
        ends: of each of the context's tokens where it begins and ends in the context.
        segments: of each token, 0 for the question's and 1 for the context's where the tokenizer tells them apart.
    """

    ids: list[int]
    start: int
    ends: list[tuple[int, int]]
    segments: list[int]


def parts(item: Item, tokenizer: PreTrainedTokenizerBase, most: int | None) -> list[Part]:
    """A question's context in parts that a model reads; none where the question leaves no room for it."""
    whole = min(PART_TOKENS, most or PART_TOKENS)
    room = whole - len(tokenizer(item.prompt, "")["input_ids"])
    if room < 1:
        return []
    found = tokenizer(
        item.prompt,
        item.context,
        truncation="only_second",
        max_length=whole,
        stride=min(SHARED_TOKENS, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    made = []
    for number, ids in enumerate(found["input_ids"]):
        inside = [at for at, whose in enumerate(found.sequence_ids(number)) if whose == 1]
        if inside:
            ends = [tuple(found["offset_mapping"][number][at]) for at in inside]
            segments = found[TYPES][number] if TYPES in found else [0] * len(ids)
            made.append(Part(list(ids), inside[0], ends, list(segments)))
    return made


@dataclass(frozen=True)
class Choice:
    """A choice behind its question.

    Attributes:
        ids: all tokens.
        segments: of each token, 0 for the question's and 1 for the choice's where the tokenizer tells them apart.
    """

    ids: list[int]
    segments: list[int]


def choices(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[Choice]:
    """An item's choices, each as the second text of a pair: what stands between is the tokenizer's."""
    found = tokenizer([item.prompt] * len(item.choices), [one.strip() for one in item.choices])
    rows = found["input_ids"]
    segments = found[TYPES] if TYPES in found else [[0] * len(ids) for ids in rows]
    return [Choice(list(ids), list(of)) for ids, of in zip(rows, segments, strict=True)]


def tagged(item: Item, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int | None]]:
    """An item's words as tokens, and the first token of each word; None of one of which no token is left.

    A space stands between all of them: tokenizers of Chinese leave it out, and make of each character its own token.
    """
    found = tokenizer(" ".join(item.tagged), return_offsets_mapping=True)
    ends, first = found["offset_mapping"], list[int | None]()
    token = begins = 0
    for word in item.tagged:
        while token < len(ends) and ends[token][1] <= begins:
            token += 1
        begins += len(word)
        first.append(token if token < len(ends) and ends[token][0] < begins else None)
        begins += 1
    return list(found["input_ids"]), first
