"""What is written in answer to an item, how it is judged, and how a model with an encoder and a decoder writes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.measures import answers, spans, texts
from stages.measures.divergence import kl_divergence
from stages.measures.documents import Document
from stages.measures.instructions import followed
from stages.measures.items import WRITTEN, Item
from stages.serving.beams import searched
from stages.serving.engine import Answerer
from stages.serving.generate import Weighed, greedy, padded
from stages.serving.generation import Generation
from stages.validate.asking import Question
from stages.validate.by_length import no_distribution

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def judged_text(item: Item, text: str) -> dict[str, Any]:
    """What an item's document says of an answer: `right` and `chance`, or how far it is like what was expected."""
    if item.task in WRITTEN:
        said = _wanted(item, text)
        score = texts.translation if item.task == "translate" else texts.summary
        return {"answer": said, **score(item.answers, item.language, said)}
    if item.task == "question":
        said = _wanted(item, text)
        found = spans.scored(item.answers, item.language, said)
        return {"right": int(found["exact"]), "chance": item.chance, "answer": said, **found}
    right = followed(item, text) if item.task == "instructions" else answers.right(item, text, ended=True)
    return {"right": int(bool(right)), "chance": item.chance, "answer": text}


def settled(item: Item, text: str) -> bool:
    """Whether nothing that comes later changes how an answer is judged."""
    if item.task == "answers":
        return answers.right(item, text, ended=False) is not None
    return _in_a_line(item) and "\n" in text.lstrip()


def translated(
    tokenizer: PreTrainedTokenizerBase,
    how: Generation,
    group: list[Question],
    judged: Answerer,
    dense: Answerer | None,
) -> list[Document]:
    """What a model with an encoder and a decoder writes in answer to a group of items, and how far it is from dense.

    It writes as it is served: by the beams that are asked for, or those of its settings. How far it is from dense is
    measured over the first reference, each token from those before it.
    """
    written = _written(tokenizer, how, group, judged)
    far = _divergences(group, judged, dense) if dense else None
    found = []
    for place, (one, new) in enumerate(zip(group, written, strict=True)):
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.wholes[0])}
        document |= {"prompt": one.item.prompt, "expected": one.expected}
        document |= judged_text(one.item, _text(tokenizer, new)) | {"repeated": int(answers.repeats(new))}
        if far is not None:
            if not math.isfinite(far[place]):
                raise no_distribution(f"a KL divergence of {far[place]} on item {one.item.id}")
            document["kl"] = far[place]
        found.append(document)
    return found


def _written(
    tokenizer: PreTrainedTokenizerBase, how: Generation, group: list[Question], judged: Answerer
) -> list[list[int]]:
    assert judged.steps is not None and judged.scores is not None
    rows, beams = [one.ids for one in group], judged.searching(how)
    weigh = judged.weighing(rows)
    most = [judged.most_new(len(one.ids), one.most_new) for one in group]
    if beams.count > 1:
        return searched(judged.scores, rows, beams, ends=judged.ends, most=most, weigh=weigh)
    return greedy(
        Weighed(judged.steps(), weigh),
        rows,
        ends=judged.ends,
        max_new_tokens=most,
        maximum_tokens=judged.maximum_tokens + max(map(len, rows)),
        enough=lambda number, new: settled(group[number].item, _text(tokenizer, new)),
    )


def _divergences(group: list[Question], judged: Answerer, dense: Answerer) -> list[float]:
    assert judged.steps is not None and dense.steps is not None
    models = judged.steps(), dense.steps()
    read = padded([one.ids for one in group], left=True)
    logits_NV = [one.begin(*read) for one in models]
    far = [0.0] * len(group)
    for at in range(max(len(one.wholes[0]) for one in group)):
        each_N = kl_divergence(*(torch.from_numpy(one) for one in reversed(logits_NV))).tolist()
        far = [
            so_far + (more if at < len(one.wholes[0]) else 0.0)
            for so_far, more, one in zip(far, each_N, group, strict=True)
        ]
        next_N = np.array([one.wholes[0][min(at, len(one.wholes[0]) - 1)] for one in group], dtype=np.int64)
        logits_NV = [one.next(next_N) for one in models]
    return far


def _text(tokenizer: PreTrainedTokenizerBase, new: list[int]) -> str:
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _in_a_line(item: Item) -> bool:
    """Whether an answer ends with its first line: that of a question, and where no reference has two."""
    return item.task == "question" or (item.task in WRITTEN and not any("\n" in one.strip() for one in item.answers))


def _wanted(item: Item, text: str) -> str:
    said = text.strip()
    return said.partition("\n")[0].rstrip() if _in_a_line(item) else said
