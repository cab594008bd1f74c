"""What a model finds in a context: the likeliest span, or that there is none.

Shapes: T tokens of a part, C tokens of its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.measures.divergence import kl_divergence
from stages.measures.documents import Document
from stages.measures.items import Item
from stages.measures.spans import scored
from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.serving.reading import best_span
from stages.validate.asking import Question
from stages.validate.by_length import by_length
from stages.validate.places import Part, parts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_LONGEST = {"en": 30, "zh": 50}
"""Tokens of an answer; of Chinese a token is a character."""


def check_contexts(items: Sequence[Item]) -> None:
    """Raise StageError where there is nothing to find an answer in."""
    for one in items:
        if not one.context.strip():
            raise StageError(
                f"item {one.id} has no context for a model that finds its answers there",
                remedy="Say in `columns` of the step of the items where the context stands.",
            )


def spans_of(
    tokenizer: PreTrainedTokenizerBase,
    most: int | None,
    silent: bool,
    group: list[Question],
    judged: Answerer,
    dense: Answerer | None,
) -> list[Document]:
    """The spans that a model finds for a group of items.

    Args:
        tokenizer: the model's.
        most: tokens that it reads at once.
        silent: it may say that there is no answer, since some questions of the set have none.
        group: items with their contexts.
        judged: the model.
        dense: what it is compared with.
    """
    where = [parts(one.item, tokenizer, most) for one in group]
    every = [part for some in where for part in some]
    rows, segments = [part.ids for part in every], [part.segments for part in every]
    ours = iter(by_length(rows, judged, segments))
    theirs = iter(by_length(rows, dense, segments)) if dense else None
    found = []
    for one, some in zip(group, where, strict=True):
        mine = [next(ours) for _ in some]
        said = _answer(one.item, some, mine, tokenizer.cls_token_id if silent else None)
        score = scored(one.item.answers, one.item.language, said)
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": 2 * len(mine)}
        document |= {"prompt": one.item.prompt, "expected": one.expected, "chance": 0.0}
        document |= {"answer": said, "right": int(score["exact"]), "repeated": 0, **score}
        if theirs is not None:
            document["kl"] = sum(float(kl_divergence(next(theirs), logits_2T).sum()) for logits_2T in mine)
        found.append(document)
    return found


def _answer(item: Item, where: Sequence[Part], logits: Sequence[Tensor], none: int | None) -> str:
    """The text of the best span of all parts; empty where it is likelier that there is none.

    Args:
        item: with its context.
        where: the parts.
        logits: logits_2T of each.
        none: the token whose own span says that there is no answer; None where there always is one.

    Source: Devlin et al., BERT, 2019, section 4.3.
    """
    pairs = list(zip(where, logits, strict=True))
    score, text = max((_best(item, *pair) for pair in pairs), key=lambda one: one[0])
    if none is None:
        return text
    return "" if min(_of_none(*pair, none) for pair in pairs) > score else text


def _of_none(part: Part, logits_2T: Tensor, none: int) -> float:
    at = part.ids.index(none) if none in part.ids else 0
    return float(logits_2T[0, at] + logits_2T[1, at])


def _best(item: Item, part: Part, logits_2T: Tensor) -> tuple[float, str]:
    """The best span that lies in the context."""
    inside = slice(part.start, part.start + len(part.ends))
    starts_C, stops_C = (one[inside].numpy().astype(np.float64) for one in logits_2T)
    score, first, last = best_span(starts_C, stops_C, _LONGEST[item.language])
    return score, item.context[part.ends[first][0] : part.ends[last][1]]
