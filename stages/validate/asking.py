"""An item as a model reads it: the tokens of its prompt, and of what may follow."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.measures.items import Item
from stages.models.text.token_ids import chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARGIN_TOKENS, _LINE_TOKENS, _INSTRUCTED_TOKENS = 4, 16, 32
"""Tokens that an answer may be longer than what is accepted, that are read of one that is looked through, and that
follow an instruction."""


@dataclass(frozen=True)
class Question:
    """An item in the model's tokens.

    Attributes:
        item: what is asked.
        ids: its prompt.
        wholes: the prompt with each choice, or with each answer that is accepted; the other text of a pair.
        most_new: tokens of an answer that are read at most.
    """

    item: Item
    ids: list[int]
    wholes: list[list[int]]
    most_new: int

    @property
    def first(self) -> list[int]:
        """What is read first: the prompt with the reference or the first choice, where that leaves its tokens alone."""
        return self.wholes[0] if self.wholes and self.wholes[0][: len(self.ids)] == self.ids else self.ids

    @property
    def name(self) -> str:
        """Its document's id. It ends in a digest, so that answers to another question can never be paired with it."""
        digest = hashlib.sha256(json.dumps([self.item.model_dump(mode="json"), self.ids]).encode()).hexdigest()
        return f"{self.item.id}-{digest[:12]}"

    @property
    def expected(self) -> str:
        """What is right, in words."""
        if self.item.task == "choices":
            return self.item.choices[self.item.right]
        if self.item.answers:
            return self.item.answers[0]
        return ", ".join(f"{one.demand} {one.value or ''}".strip() for one in self.item.checks)


def question(item: Item, tokenizer: PreTrainedTokenizerBase, most: int | None) -> Question | None:
    """An item as a model reads it; None where it is longer than the `most` tokens that it reads, or no token at all."""
    ids, spoken = _prompt(item, tokenizer), item.choices
    if item.task == "answers":
        spoken = tuple(f"{_gap(item)}{one}" for one in item.answers)
    if item.task == "classify":
        # A class is found from the beginning of a text that is too long.
        ids = list(tokenizer(item.prompt, truncation=most is not None, max_length=most)["input_ids"])
        return Question(item, ids, [], 0) if ids else None
    if item.task in ("similarity", "retrieval"):
        pair = [tokenizer(one, truncation=most is not None, max_length=most) for one in (item.prompt, item.other)]
        ids, other = (list(one["input_ids"]) for one in pair)
        return Question(item, ids, [other], 0) if ids and other else None
    wholes = [list(tokenizer(f"{item.prompt}{one}")["input_ids"]) for one in spoken]
    longest = max(map(len, [ids, *wholes]))
    new = _INSTRUCTED_TOKENS if item.task == "instructions" else longest - len(ids) + _MARGIN_TOKENS
    if item.task == "answers" and item.match != "exact":
        new = max(new, _LINE_TOKENS)
    return Question(item, ids, wholes, new) if ids and (most is None or longest <= most) else None


def _prompt(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return _told(item.prompt, tokenizer) if item.task == "instructions" else list(tokenizer(item.prompt)["input_ids"])


def _told(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a user says, by the chat template where there is one."""
    if (template := chat_template(tokenizer)) is None:
        return list(tokenizer(f"{prompt}\n")["input_ids"])
    said = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(
        said, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    return ids


def _gap(item: Item) -> str:
    return "" if item.language == "zh" or item.prompt[-1].isspace() else " "
