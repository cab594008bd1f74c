"""What a model says of each word of an item: the likeliest label of its first token.

Shapes: T tokens, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from stages.measures.divergence import kl_divergence
from stages.measures.documents import Document
from stages.measures.entities import counted, of_entities
from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.validate.asking import Question
from stages.validate.by_length import by_length
from stages.validate.classifying import labels, place_of
from stages.validate.places import tagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OUTSIDE = "O"
"""What a word is called of which the tokenizer leaves nothing."""


def check_tags(config: PreTrainedConfig, asked: Sequence[Question]) -> None:
    """Raise StageError where an item has a label that the model has not, by its name or by its number."""
    known = labels(config)
    for one in asked:
        for word, label in zip(one.item.tagged, one.item.labels, strict=True):
            if place_of(label, known) is None:
                raise StageError(
                    f"item {one.item.id} calls {word!r} what the model does not know",
                    measured=repr(label),
                    limit=", ".join(known),
                    remedy="Write the labels as `id2label` of config.json does, or as numbers from 0.",
                )


def tags_of(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: list[Question],
    judged: Answerer,
    dense: Answerer | None,
) -> list[Document]:
    """The labels that a model gives the words of a group of items."""
    known = labels(config)
    entities = of_entities(known)
    rows = [one.ids for one in group]
    ours, theirs = by_length(rows, judged), by_length(rows, dense) if dense else None
    found = []
    for place, one in enumerate(group):
        best_T = ours[place].argmax(-1).tolist()
        _, first = tagged(one.item, tokenizer)
        said = [_OUTSIDE if at is None else known[best_T[at]] for at in first]
        expected = [known[place_of(label, known) or 0] for label in one.item.labels]
        document: Document = {"id": one.name, "slice": one.item.ability, "tokens": len(one.ids)}
        document |= {"prompt": one.item.prompt, "expected": " ".join(expected), "chance": 0.0}
        document |= {"answer": " ".join(said), "right": int(said == expected), "repeated": 0}
        document |= counted(expected, said, entities=entities)
        if theirs is not None:
            document["kl"] = float(kl_divergence(theirs[place], ours[place]).sum())
        found.append(document)
    return found
