"""Measures of tags, from the documents of items; see `stages.measures.item_scores`.

An entity is right where its kind and both ends are: what is counted of each item is what seqeval finds there, and a sum
of counts is what seqeval finds in all items together.

Shapes: R resamples, X counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from stages.measures.item_scores import Columns, Floats

_BEGINS = ("B-", "I-", "E-", "S-")


def of_entities(labels: Iterable[str]) -> bool:
    """Whether labels say where entities begin and end; parts of speech do not."""
    return all(one == "O" or (one.startswith(_BEGINS) and len(one) > len("B-")) for one in labels)


def counted(expected: Sequence[str], found: Sequence[str], *, entities: bool) -> dict[str, list[int]]:
    """What an item's tags add to the measures.

    Args:
        expected: the label of each word.
        found: what the model gives it.
        entities: the labels are of entities.

    Returns:
        `tags`: right ones and all; `entities`: right ones, found ones and expected ones.
    """
    counts = {"tags": [sum(map(str.__eq__, expected, found)), len(expected)]}
    if entities:
        from seqeval.metrics.sequence_labeling import get_entities

        theirs, ours = ({*get_entities(list(one))} for one in (expected, found))
        counts["entities"] = [len(theirs & ours), len(ours), len(theirs)]
    return counts


def entity_precision(ours: Columns, weights_RD: Floats) -> Floats:
    """Of the entities that are found the share that are right."""
    right_R, found_R, _ = _sums(ours, "entities", weights_RD)
    return _share(right_R, found_R)


def entity_recall(ours: Columns, weights_RD: Floats) -> Floats:
    """Of the entities that are there the share that are found."""
    right_R, _, there_R = _sums(ours, "entities", weights_RD)
    return _share(right_R, there_R)


def entity_f1(ours: Columns, weights_RD: Floats) -> Floats:
    """The harmonic mean of the entities' precision and recall, all kinds together (micro)."""
    right_R, found_R, there_R = _sums(ours, "entities", weights_RD)
    return _share(2 * right_R, found_R + there_R)


def tag_accuracy(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of words that are given their own label."""
    return _share(*_sums(ours, "tags", weights_RD))


def _sums(ours: Columns, key: str, weights_RD: Floats) -> Floats:
    found_XR: Floats = (weights_RD @ ours[key].astype(np.float64)).T
    return found_XR


def _share(part_R: Floats, whole_R: Floats) -> Floats:
    """Nothing of nothing counts as nothing, as it does to seqeval."""
    found: Floats = np.divide(part_R, whole_R, out=np.zeros_like(part_R), where=whole_R > 0)
    return found
