"""An item as a model reads it: the tokens of its prompt, and of what may follow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.measures.items import WRITTEN, Item
from stages.models.text.token_ids import chat_template
from stages.validate.places import choices, parts, tagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARGIN_TOKENS, _LINE_TOKENS, _INSTRUCTED_TOKENS = 4, 16, 32
"""Tokens that an answer may be longer than what is accepted, that are read of one that is looked through, and that
follow an instruction."""
_LONGER = 2
"""A text may be so many times as long as its longest reference: one that does not end must not be cut to fit it."""
_CONTEXT = {"en": "{0}\n\nQuestion: {1}\nAnswer:", "zh": "{0}\n\n问题：{1}\n答案："}
"""How a model that continues text is asked about a context."""


@dataclass(frozen=True)
class Question:
    """An item in the model's tokens.

    Attributes:
        item: what is asked.
        ids: its prompt.
        wholes: the prompt with each choice, or with each answer that is accepted; the other text of a pair. Of a model
            with a decoder of its own each reference alone; of one that finds answers in a context each part of that,
            behind the question; of one that chooses each choice, behind the question.
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
        if self.item.task == "question":
            return ""
        return ", ".join(f"{one.demand} {one.value or ''}".strip() for one in self.item.checks)


def question(
    item: Item, tokenizer: PreTrainedTokenizerBase, most: int | None, task: str = "generate"
) -> Question | None:
    """An item as a model reads it; None where it is longer than it reads, or no token at all.

    Args:
        item: what is asked.
        tokenizer: the model's.
        most: tokens that it reads at once, None for any number.
        task: what the model is for.
    """
    if item.task == "classify":
        # A class is found from the beginning of a text that is too long.
        ids = list(tokenizer(item.prompt, truncation=most is not None, max_length=most)["input_ids"])
        return Question(item, ids, [], 0) if ids else None
    if item.task in ("similarity", "retrieval"):
        pair = [tokenizer(one, truncation=most is not None, max_length=most) for one in (item.prompt, item.other)]
        ids, other = (list(one["input_ids"]) for one in pair)
        return Question(item, ids, [other], 0) if ids and other else None
    if task == "answer":
        rows = [part.ids for part in parts(item, tokenizer, most)]
        return Question(item, rows[0], rows, 0) if rows else None
    if task == "choose":
        rows = [one.ids for one in choices(item, tokenizer)]
        return Question(item, rows[0], rows, 0) if _fits(rows, most) else None
    if task == "translate":
        references = [list(tokenizer(text_target=one)["input_ids"]) for one in item.answers]
        asked = Question(item, list(tokenizer(item.prompt)["input_ids"]), references, _most_written(references, 0))
        return asked if asked.ids and _fits([asked.ids, *references], most) else None
    ids = tagged(item, tokenizer)[0] if item.task == "tag" else _prompt(item, tokenizer)
    wholes = _wholes(item, ids, tokenizer)
    return Question(item, ids, wholes, _most_new(item, ids, wholes)) if ids and _fits([ids, *wholes], most) else None


def _fits(rows: Sequence[Sequence[int]], most: int | None) -> bool:
    return most is None or max(map(len, rows)) <= most


def _wholes(item: Item, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompt with each of what may follow it."""
    if item.task in WRITTEN:
        plain = [list(tokenizer(f"{_gap(item)}{one}", add_special_tokens=False)["input_ids"]) for one in item.answers]
        return [ids + one for one in plain]
    before = _about(item)
    spoken = item.choices if item.task == "choices" else tuple(f"{_gap(item)}{one}" for one in item.answers)
    return [list(tokenizer(f"{before}{one}")["input_ids"]) for one in spoken]


def _most_new(item: Item, ids: Sequence[int], wholes: Sequence[Sequence[int]]) -> int:
    if item.task == "instructions":
        return _INSTRUCTED_TOKENS
    if item.task in WRITTEN:
        return _most_written(wholes, len(ids))
    new = max(map(len, [ids, *wholes])) - len(ids) + _MARGIN_TOKENS
    looked_through = item.task == "question" or (item.task == "answers" and item.match != "exact")
    return max(new, _LINE_TOKENS) if looked_through else new


def _most_written(wholes: Sequence[Sequence[int]], before: int) -> int:
    return _LONGER * (max(map(len, wholes)) - before) + _LINE_TOKENS


def _about(item: Item) -> str:
    """What a model that continues text is asked, with the context where there is one."""
    asked = item.task == "question" and item.context.strip()
    return _CONTEXT[item.language].format(item.context, item.prompt) if asked else item.prompt


def _prompt(item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if item.task == "instructions" or (item.task in WRITTEN and chat_template(tokenizer) is not None):
        return _told(item.prompt, tokenizer)
    return list(tokenizer(_about(item))["input_ids"])


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
