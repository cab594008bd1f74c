"""Items that are put to a model one small group after another: what it answers, and whether that is right.

A group is always the same items side by side, so that what an item is answered does not depend on which worker asks.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

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
from stages.measures.leaks import leaks
from stages.measures.perplexity import negative_log_likelihood
from stages.models.anatomy import tasks
from stages.models.checkpoint.loading import load_config, load_tokenizer
from stages.models.text.token_ids import plain_text
from stages.models.text.windows import passages
from stages.runtime.contract import Metrics, Progress, StageError
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS, confirmed, greedy, padded
from stages.validate.asking import Question, question
from stages.validate.text import of_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.validate.params import ValidateParams

TOGETHER = 32
"""Items of a group: a model that keeps what it read answers so many nearly as fast as one."""


@dataclass(frozen=True)
class Questions:
    """A set of items, in groups."""

    groups: list[list[Question]]
    order: list[str]
    tokenizer: PreTrainedTokenizerBase
    about: Mapping[str, Any]
    seen: tuple[Path, ...]
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

    def _asked(self, group: list[Question], judged: Answerer, dense: Answerer | None) -> list[Document]:
        passes = list(_answered([one.first for one in group], judged.forward))
        pairs = list(zip(group, passes, strict=True))
        said = iter(self._written([one for one in pairs if one[0].item.task != "choices"], judged))
        chosen = _chosen([one for one in pairs if one[0].item.task == "choices"], judged)
        read = _read(pairs, dense)
        found = []
        for one in group:
            document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
            document |= {"prompt": one.item.prompt, "expected": one.expected, "chance": one.item.chance}
            document |= next(chosen) if one.item.task == "choices" else self._judged(one.item, next(said))
            found.append(document | next(read))
        return found

    def _judged(self, item: Item, new: list[int]) -> dict[str, Any]:
        text = self._text(new)
        right = followed(item, text) if item.task == "instructions" else answers.right(item, text, ended=True)
        return {"right": int(bool(right)), "answer": text, "repeated": int(answers.repeats(new))}

    def _text(self, new: list[int]) -> str:
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _written(self, pairs: Sequence[tuple[Question, torch.Tensor]], judged: Answerer) -> list[list[int]]:
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
        told = self._told()
        documents = [by_name[name] | {"leaked": int(name in told)} for name in self.order]
        found = {"items": True, **self.about, "documents": documents, "measures": summary(documents)}
        return found | by_slice(documents)

    def _told(self) -> set[str]:
        """Items that stand with their answers in the text that made the model what it is."""
        names = {one.item.id: one.name for group in self.groups for one in group}
        items = [one.item for group in self.groups for one in group]
        text = (
            (f"{split}/{passage['id']}", passage_text(passage))
            for corpus in self.seen
            for split in ("calibrate", "train")
            if (corpus / f"{split}.jsonl").is_file()
            for passage in passages(corpus, split)
        )
        return {names[item] for item, _ in leaks(items, text)}

    def metrics(self, documents: list[Document]) -> Metrics:
        """Figures beside the measures."""
        return {"items": float(len(documents))}


def questions_of(params: ValidateParams, inputs: Mapping[str, Path], progress: Progress | None = None) -> Questions:
    """The items of a set, as the model reads them; those that it cannot read in whole are left out, and said.

    Raises:
        StageError: the model continues no text, or reads none of the items.
    """
    config, tokenizer = load_config(inputs["model"]), load_tokenizer(inputs["model"])
    check_task(tasks.task(config))
    reads = [one for one in (tasks.longest(config), of_engine(inputs["model"])) if one is not None]
    items = list(islice(read_items(inputs["text"], params.split), params.items))
    found = [question(one, tokenizer, min(reads, default=None)) for one in items]
    asked = [one for one in found if one is not None]
    if missing := [item.id for item, one in zip(items, found, strict=True) if one is None]:
        what = f"{len(missing)} of {len(items)} items are more than the {min(reads, default=0)} tokens that it reads"
        if not asked:
            raise StageError("the model can read none of the items", measured=what, remedy="Take shorter ones.")
        if progress:
            progress.note(f"{what}, and are left out: {missing[0]} is the first")
    apart = sorted(range(len(asked)), key=lambda number: (len(asked[number].ids), number))
    groups = [[asked[one] for one in apart[start : start + TOGETHER]] for start in range(0, len(asked), TOGETHER)]
    seen = tuple(folder for role, folder in inputs.items() if role.startswith("seen."))
    record = json.loads((inputs["text"] / "corpus.json").read_text(encoding="utf-8"))
    about = {"vocabulary": config.get_text_config().vocab_size, "shipped": bool(record.get("shipped"))}
    if missing:
        about["left_out"] = missing
    return Questions(groups, [one.name for one in asked], tokenizer, about, seen)


def check_task(task: str) -> None:
    """Raise StageError of a model that is no judge of items."""
    if task != "generate":
        raise StageError(
            "items are put to models that continue a text",
            measured=f"the model's task is {task}",
            limit="generate",
            remedy="Take the set of items out of `judge`, or judge such a model on text.",
        )


def _answered(rows: Sequence[Sequence[int]], forward: Forward) -> Iterator[torch.Tensor]:
    """logits_TV of each row, some rows side by side."""
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        for row, logits_TV in zip(some, forward(*padded(some)), strict=True):
            yield torch.from_numpy(logits_TV[: len(row)])


def _chosen(pairs: Sequence[tuple[Question, torch.Tensor]], judged: Answerer) -> Iterator[dict[str, Any]]:
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


def _read(pairs: Sequence[tuple[Question, torch.Tensor]], dense: Answerer | None) -> Iterator[dict[str, float]]:
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


def passage_text(passage: Mapping[str, Any]) -> str:
    """What a passage says, a conversation as well."""
    return str(passage["text"]) if "text" in passage else plain_text(passage["messages"])


def _is_sound(one: Document, *, paired: bool) -> bool:
    keys = ("right", "chance", "repeated", "tokens", "prompt_nll", *(["kl"] if paired else []))
    numbers = [one[key] for key in keys]
    return all(math.isfinite(number) for number in numbers) and isinstance(one["answer"], str)
