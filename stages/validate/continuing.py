"""What a model that continues text answers to items: greedy text, the likeliest choice.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from stages.adapters.backends import Forward
from stages.measures import answers
from stages.measures.divergence import kl_divergence
from stages.measures.documents import Document
from stages.measures.items import Item
from stages.measures.perplexity import negative_log_likelihood
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS, Weighed, confirmed, greedy, padded
from stages.validate.asking import Question
from stages.validate.by_length import no_distribution
from stages.validate.written import judged_text, settled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def continued(
    tokenizer: PreTrainedTokenizerBase, group: list[Question], judged: Answerer, dense: Answerer | None
) -> list[Document]:
    """What a model that continues text says to a group of items, and how far it is from dense on their prompts."""
    passes = list(_answered([one.first for one in group], judged.forward))
    pairs = list(zip(group, passes, strict=True))
    said = iter(_written(tokenizer, [one for one in pairs if one[0].item.task != "choices"], judged))
    chosen = _chosen([one for one in pairs if one[0].item.task == "choices"], judged)
    read = _read(pairs, dense)
    found = []
    for one in group:
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
        document |= {"prompt": one.item.prompt, "expected": one.expected}
        document |= (
            next(chosen) if one.item.task == "choices" else _judged(tokenizer, one.item, next(said), judged.ends)
        )
        found.append(document | next(read))
    return found


def _judged(tokenizer: PreTrainedTokenizerBase, item: Item, new: list[int], ends: frozenset[int]) -> dict[str, Any]:
    text = _text(tokenizer, new)
    # Any other answer is read no further than to where it is settled, and nobody knows whether it would end.
    ended = item.task != "instructions" or bool(ends.intersection(new[-1:]))
    spelt = not item.answers or any(one in text for one in item.answers)
    found = {"repeated": answers.repeats(new), "ended": ended, "spelt": spelt}
    found = judged_text(item, text) | {key: int(bool(value)) for key, value in found.items()}
    # Of what is answered in words no choice is longer than another.
    return found | {"said": " ".join(map(str, new))} | ({"right_by_length": found["right"]} if "right" in found else {})


def _text(tokenizer: PreTrainedTokenizerBase, new: list[int]) -> str:
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _written(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Question, torch.Tensor]], judged: Answerer
) -> list[list[int]]:
    """What is answered to each, read up to the point where that is settled."""

    def enough(number: int, new: list[int]) -> bool:
        return settled(pairs[number][0].item, _text(tokenizer, new))

    rows = [one.ids for one, _ in pairs]
    most, weigh = [judged.most_new(len(one.ids), one.most_new) for one, _ in pairs], judged.weighing(rows)
    begun = [
        confirmed(
            logits_TV[len(one.ids) - 1 :].numpy(),
            one.first[len(one.ids) :],
            judged.ends,
            partial(enough, at),
            partial(weigh, at),
        )[:limit]
        for at, ((one, logits_TV), limit) in enumerate(zip(pairs, most, strict=True))
    ]
    return greedy(
        Weighed(judged.steps() if judged.steps else judged.forward, weigh),
        rows,
        ends=judged.ends,
        max_new_tokens=most,
        maximum_tokens=judged.maximum_tokens,
        begun=begun,
        enough=enough,
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
            "chance": one.item.chance,
            "answer": one.item.choices[best],
            "said": str(best),
            "repeated": 0,
            "ended": 1,
            "spelt": 1,
        }


def _surprise(row: list[int], prompt: list[int], logits_TV: torch.Tensor) -> tuple[float, float]:
    """Sum and mean of what the tokens of a choice cost, all behind those that it shares with the prompt alone."""
    shared = next((at for at, (a, b) in enumerate(zip(row, prompt, strict=False)) if a != b), len(prompt))
    start = max(1, min(shared, len(row) - 1))
    nll = negative_log_likelihood(logits_TV[start - 1 : -1], torch.tensor(row[start:]))
    if nll.isnan().any():
        raise no_distribution("NaN behind a choice")
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
            raise no_distribution(f"{found} on item {one.item.id}")
        yield found
