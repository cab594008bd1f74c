"""What a model that scores a question with each of its choices says of items: the likeliest choice.

Shapes: C choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.measures.divergence import kl_divergence
from stages.measures.documents import Document
from stages.serving.engine import Answerer
from stages.validate.asking import Question
from stages.validate.by_length import by_length
from stages.validate.places import choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chosen(
    tokenizer: PreTrainedTokenizerBase, group: list[Question], judged: Answerer, dense: Answerer | None
) -> list[Document]:
    """The choices that a model makes for a group of items; of equal ones the first."""
    every = [one for asked in group for one in choices(asked.item, tokenizer)]
    rows, segments = [one.ids for one in every], [one.segments for one in every]
    ours = iter(by_length(rows, judged, segments))
    theirs = iter(by_length(rows, dense, segments)) if dense else None
    found = []
    for one in group:
        score_C = torch.cat([next(ours) for _ in one.item.choices])
        best = int(score_C.argmax())
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
        document |= {"prompt": one.item.prompt, "expected": one.expected, "chance": one.item.chance}
        document |= {"answer": one.item.choices[best], "right": int(best == one.item.right), "repeated": 0}
        if theirs is not None:
            dense_C = torch.cat([next(theirs) for _ in one.item.choices])
            document["kl"] = float(kl_divergence(dense_C[None], score_C[None]).sum()) * len(one.ids)
        found.append(document)
    return found
