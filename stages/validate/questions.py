"""Items that are put to a model one small group after another: what it answers, and whether that is right.

A group is always the same items side by side, so that what an item is answered does not depend on which worker asks.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.adapters.backends import Forward
from stages.measures import answers
from stages.measures.divergence import kl_divergence
from stages.measures.documents import Document, by_slice, summary
from stages.measures.instructions import followed
from stages.measures.items import Item, read_items
from stages.measures.perplexity import negative_log_likelihood
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.text.token_ids import chat_template
from stages.runtime.contract import Metrics, StageError
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS, confirmed, greedy, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.validate.params import ValidateParams

TOGETHER = 32
"""Items of a group: a model that keeps what it read answers so many nearly as fast as one."""
_MARGIN_TOKENS, _LINE_TOKENS, _INSTRUCTED_TOKENS = 4, 16, 32


@dataclass(frozen=True)
class _Question:
    """An item in the model's tokens.

    Attributes:
        item: what is asked.
        ids: its prompt.
        wholes: the prompt with each choice, or with each answer that is accepted.
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


@dataclass(frozen=True)
class Questions:
    """A set of items, in groups."""

    groups: list[list[_Question]]
    order: list[str]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    task: str = "generate"
    units: str = "groups of items"

    def __len__(self) -> int:
        """How many groups are asked; each by itself."""
        return len(self.groups)

    def scorer(self, judged: Answerer, dense: Answerer | None) -> Callable[[range], Iterator[list[Document]]]:
        """Returns a range of groups -> the documents of each one's items."""

        def score(span: range) -> Iterator[list[Document]]:
            for group in self.groups[span.start : span.stop]:
                yield self._asked(group, judged, dense)

        return score

    def _asked(self, group: list[_Question], judged: Answerer, dense: Answerer | None) -> list[Document]:
        passes = list(_answered([one.first for one in group], judged.forward))
        pairs = list(zip(group, passes, strict=True))
        said = iter(self._written([one for one in pairs if one[0].item.task != "choices"], judged))
        chosen = _chosen([one for one in pairs if one[0].item.task == "choices"], judged)
        read = _read(pairs, dense)
        found = []
        for one in group:
            document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
            document |= {"prompt": one.item.prompt, "expected": _expected(one.item), "chance": one.item.chance}
            document |= next(chosen) if one.item.task == "choices" else self._judged(one.item, next(said))
            found.append(document | next(read))
        return found

    def _judged(self, item: Item, new: list[int]) -> dict[str, Any]:
        text = self._text(new)
        right = followed(item, text) if item.task == "instructions" else answers.right(item, text, ended=True)
        return {"right": int(bool(right)), "answer": text, "repeated": int(answers.repeats(new))}

    def _text(self, new: list[int]) -> str:
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _written(self, pairs: Sequence[tuple[_Question, torch.Tensor]], judged: Answerer) -> list[list[int]]:
        """What is answered to each, read up to the point where that is settled."""

        def enough(number: int, new: list[int]) -> bool:
            item = pairs[number][0].item
            return item.task == "answers" and answers.right(item, self._text(new), ended=False) is not None

        begun = [
            confirmed(
                logits_TV[len(one.ids) - 1 :].numpy(), one.first[len(one.ids) :], judged.ends, partial(enough, at)
            )
            for at, (one, logits_TV) in enumerate(pairs)
        ]
        return greedy(
            judged.steps() if judged.steps else judged.forward,
            [one.ids for one, _ in pairs],
            ends=judged.ends,
            max_new_tokens=[one.most_new for one, _ in pairs],
            maximum_tokens=judged.maximum_tokens,
            begun=begun,
            enough=enough,
        )

    def read(self, data: bytes, span: range, *, paired: bool) -> list[list[Document]] | None:
        """The documents of a range of groups as they were written, None unless they are of exactly these."""
        try:
            found: list[list[Document]] = json.loads(data)
            names = [[str(one["id"]) for one in unit] for unit in found]
            sound = all(_is_sound(one, paired=paired) for unit in found for one in unit)
        except (ValueError, TypeError, KeyError):
            return None
        expected = [[one.name for one in group] for group in self.groups[span.start : span.stop]]
        return found if sound and names == expected else None

    def report(self, units: list[list[Document]]) -> dict[str, Any]:
        """What report.json says of all items."""
        by_name = {one["id"]: one for unit in units for one in unit}
        documents = [by_name[name] for name in self.order]
        found = {"items": True, "vocabulary": self.vocabulary, "documents": documents, "measures": summary(documents)}
        return found | by_slice(documents)

    def metrics(self, documents: list[Document]) -> Metrics:
        """Figures beside the measures."""
        return {"items": float(len(documents))}


def questions_of(params: ValidateParams, inputs: Mapping[str, Path]) -> Questions:
    """The items of a set, as the model reads them.

    Raises:
        StageError: the model continues no text, or reads less than an item.
    """
    config, tokenizer = load_config(inputs["model"]), load_tokenizer(inputs["model"])
    check_task(tasks.task(config))
    most = tasks.longest(config)
    items = islice(read_items(inputs["text"], params.split), params.items)
    asked = [_question(one, tokenizer, most) for one in items]
    apart = sorted(range(len(asked)), key=lambda number: (len(asked[number].ids), number))
    groups = [[asked[one] for one in apart[start : start + TOGETHER]] for start in range(0, len(asked), TOGETHER)]
    return Questions(groups, [one.name for one in asked], tokenizer, config.get_text_config().vocab_size)


def check_task(task: str) -> None:
    """Raise StageError of a model that is no judge of items."""
    if task != "generate":
        raise StageError(
            "items are put to models that continue a text",
            measured=f"the model's task is {task}",
            limit="generate",
            remedy="Take the set of items out of `judge`, or judge such a model on text.",
        )


def _question(item: Item, tokenizer: PreTrainedTokenizerBase, most: int | None) -> _Question:
    ids, spoken = _prompt(item, tokenizer), item.choices
    if item.task == "answers":
        spoken = tuple(f"{_gap(item)}{one}" for one in item.answers)
    wholes = [list(tokenizer(f"{item.prompt}{one}")["input_ids"]) for one in spoken]
    longest = max(map(len, [ids, *wholes]))
    new = _INSTRUCTED_TOKENS if item.task == "instructions" else longest - len(ids) + _MARGIN_TOKENS
    if item.task == "answers" and item.match != "exact":
        new = max(new, _LINE_TOKENS)
    if not ids or (most is not None and longest > most):
        raise StageError(
            f"item {item.id} is longer than the model reads" if ids else f"item {item.id} is no token to the model",
            measured=f"{longest} tokens",
            limit=f"{most} tokens" if ids else "1 token",
            remedy="Leave the item out of its set.",
        )
    return _Question(item, ids, wholes, new)


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


def _answered(rows: Sequence[Sequence[int]], forward: Forward) -> Iterator[torch.Tensor]:
    """logits_TV of each row, some rows side by side."""
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        for row, logits_TV in zip(some, forward(*padded(some)), strict=True):
            yield torch.from_numpy(logits_TV[: len(row)])


def _chosen(pairs: Sequence[tuple[_Question, torch.Tensor]], judged: Answerer) -> Iterator[dict[str, Any]]:
    """Which choice of each item is likeliest, and whether it is by the mean over its tokens, too."""
    others = [one.wholes[one.first is not one.ids :] for one, _ in pairs]
    found = _answered([row for rows in others for row in rows], judged.forward)
    for (one, logits_TV), rows in zip(pairs, others, strict=True):
        costs = [] if one.first is one.ids else [_surprise(one.first, one.ids, logits_TV)]
        costs += [_surprise(row, one.ids, next(found)) for row in rows]
        best, by_length = (each.index(min(each)) for each in zip(*costs, strict=True))
        yield {
            "right": int(best == one.item.right),
            "right_by_length": int(by_length == one.item.right),
            "answer": one.item.choices[best],
            "repeated": 0,
        }


def _surprise(row: list[int], prompt: list[int], logits_TV: torch.Tensor) -> tuple[float, float]:
    """Sum and mean of what the tokens of a choice cost, all behind those that it shares with the prompt alone."""
    shared = next((at for at, (a, b) in enumerate(zip(row, prompt, strict=False)) if a != b), len(prompt))
    start = max(1, min(shared, len(row) - 1))
    nll = negative_log_likelihood(logits_TV[start - 1 : -1], torch.tensor(row[start:]))
    return float(nll.sum()), float(nll.mean())


def _read(pairs: Sequence[tuple[_Question, torch.Tensor]], dense: Answerer | None) -> Iterator[dict[str, float]]:
    """How surprising each prompt is, and the sum of the KL divergence from the baseline over its positions."""
    # Rows of the same lengths: a model is at no distance from itself.
    theirs = _answered([one.first for one, _ in pairs], dense.forward) if dense else None
    for one, logits_TV in pairs:
        ours_TV = logits_TV[: len(one.ids)]
        found = {"prompt_nll": float(negative_log_likelihood(ours_TV[:-1], torch.tensor(one.ids[1:])).sum())}
        if theirs is not None:
            found["kl"] = float(kl_divergence(next(theirs)[: len(one.ids)], ours_TV).sum())
        if not all(map(math.isfinite, found.values())):
            raise StageError(
                "the model or its baseline gave logits that are no distribution", measured=str(found), limit="finite"
            )
        yield found


def _expected(item: Item) -> str:
    if item.task == "choices":
        return item.choices[item.right]
    return (
        item.answers[0] if item.answers else ", ".join(f"{one.demand} {one.value or ''}".strip() for one in item.checks)
    )


def _is_sound(one: Document, *, paired: bool) -> bool:
    keys = ("right", "chance", "repeated", "tokens", "prompt_nll", *(["kl"] if paired else []))
    numbers = [one[key] for key in keys]
    return all(math.isfinite(number) for number in numbers) and isinstance(one["answer"], str)
