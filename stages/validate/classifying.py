"""What a classifier says of items: the likeliest class, and how sure it is.

Shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from stages.measures.divergence import kl_divergence, kl_of_labels
from stages.measures.documents import Document
from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.serving.found import SEVERAL
from stages.validate.asking import Question
from stages.validate.by_length import by_length


def labels(config: PreTrainedConfig) -> list[str]:
    """The names of a classifier's classes, in order."""
    return [str(config.id2label[place]) for place in range(config.num_labels)]


def check_labels(config: PreTrainedConfig, asked: Sequence[Question]) -> None:
    """Raise StageError where an item names a class that the model has not, by its name or by its number."""
    known = labels(config)
    for one in asked:
        if place_of(one.item.answers[0], known) is None:
            raise StageError(
                f"item {one.item.id} is of a class that the model does not know",
                measured=repr(one.item.answers[0]),
                limit=", ".join(known),
                remedy="Write the labels as `id2label` of config.json does, or as numbers from 0.",
            )


def classified(
    config: PreTrainedConfig, group: list[Question], judged: Answerer, dense: Answerer | None
) -> list[Document]:
    """The classes that a model finds for a group of items."""
    known, several = labels(config), config.problem_type == SEVERAL
    rows = [one.ids for one in group]
    ours, theirs = by_length(rows, judged), by_length(rows, dense) if dense else None
    found = []
    for place, one in enumerate(group):
        logits_C = ours[place].double()
        shares_C = torch.sigmoid(logits_C) if several else torch.softmax(logits_C, -1)
        best, right = int(shares_C.argmax()), place_of(one.item.answers[0], known)
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
        document |= {"prompt": one.item.prompt, "expected": known[right or 0], "chance": 1 / len(known)}
        document |= {"answer": known[best], "right": int(best == right), "repeated": 0}
        document["confidence"] = float(shares_C[best])
        if theirs is not None:
            apart = (kl_of_labels if several else kl_divergence)(theirs[place][None], ours[place][None])
            document["kl"] = float(apart.sum()) * len(one.ids)
        found.append(document)
    return found


def place_of(label: str, known: Sequence[str]) -> int | None:
    """The number of a label that is given by its name or as that number."""
    if label in known:
        return known.index(label)
    return int(label) if label.isdecimal() and int(label) < len(known) else None
