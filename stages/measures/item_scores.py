"""Measures of a set of items, from the documents of its items.

Each takes the documents' columns, those of the other report where it compares two, and how often each item is drawn:
weights_RD of R resamples and D items. It gives the measure of each resample, value_R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.measures.table import BROUGHT, Measure

Floats = NDArray[np.float64]
Columns = Mapping[str, NDArray[Any]]
"""Key of the documents -> its values, one an item."""


def columns(documents: Sequence[Mapping[str, Any]]) -> Columns:
    """The keys that all documents have, each with their values."""
    keys = set.intersection(*(set(one) for one in documents))
    return {key: np.array([one[key] for one in documents]) for key in keys}


def function_of(measure: Measure) -> Callable[..., Floats]:
    """The function of a measure of items."""
    module, _, name = measure.function.partition(":")
    found: Callable[..., Floats] = getattr(import_module(module), name)
    return partial(found, measure.score) if measure.score.startswith(BROUGHT) else found


def accuracy(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of items that are answered right."""
    return _mean(ours["right"], weights_RD)


def accuracy_by_length(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of items that are answered right, where that choice counts whose tokens are likeliest in the mean."""
    return _mean(ours["right_by_length"], weights_RD)


def above_chance(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of items that are answered right, less the share that a guess would get right."""
    return _mean(ours["right"] - ours["chance"], weights_RD)


def flips(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """The share of items that one answers right and the other wrong.

    Source: Dutta et al., Accuracy is Not All You Need, NeurIPS 2024.
    """
    return _mean(ours["right"] != theirs["right"], weights_RD)


def lost(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """The share of items that the other answers right and this one wrong."""
    return _mean((theirs["right"] > 0) & (ours["right"] == 0), weights_RD)


def same_answers(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """The share of items to which both give the same answer, right or wrong."""
    return _mean(ours["answer"] == theirs["answer"], weights_RD)


def same_beginning(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """Of the tokens of both answers the share before the first that differs, over as many as both have; the mean.

    An answer is read up to where it is settled whether it is right, so that one may be longer than the other.
    """
    return _mean(np.array([_begins(*pair) for pair in zip(ours["said"], theirs["said"], strict=True)]), weights_RD)


def _begins(ours: str, theirs: str) -> float:
    one, other = ours.split(), theirs.split()
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
    return same / min(len(one), len(other)) if one and other else float(ours == theirs)


def repetition(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of items whose answer says the same again and again."""
    return _mean(ours["repeated"], weights_RD)


def repeating(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """The share of items whose answer says the same again and again, where the other's does not."""
    return _mean((ours["repeated"] > 0) & (theirs["repeated"] == 0), weights_RD)


def endless(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """The share of items whose answer goes on where the other's ends."""
    return _mean((theirs["ended"] > 0) & (ours["ended"] == 0), weights_RD)


def respelt(ours: Columns, theirs: Columns, weights_RD: Floats) -> Floats:
    """The share of items that both answer right, the other as it is accepted and this one in another case."""
    both = (ours["right"] > 0) & (theirs["right"] > 0)
    return _mean(both & (theirs["spelt"] > 0) & (ours["spelt"] == 0), weights_RD)


def leaks(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of items that stand with their answers in a text that the model was calibrated or trained on."""
    return _mean(ours["leaked"], weights_RD)


def robustness(ours: Columns, weights_RD: Floats) -> Floats:
    """Right answers to items that are typed otherwise, over those to the same items as they are written.

    NaN where nothing that can be typed otherwise is answered right: there is nothing to keep.
    """
    return _over(ours["varied_right"], ours["varied"] * ours["right"], weights_RD)


def variant_flips(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of items typed otherwise that are answered right and as they are written wrong, or the reverse."""
    return _over(ours["varied_flipped"], ours["varied"], weights_RD)


def own(score: str, ours: Columns, weights_RD: Floats) -> Floats:
    """The mean of what a measure of one's own says of each item."""
    return _mean(ours[score], weights_RD)


def _over(part_D: NDArray[Any], whole_D: NDArray[Any], weights_RD: Floats) -> Floats:
    part_R, whole_R = (weights_RD @ one.astype(np.float64) for one in (part_D, whole_D))
    found: Floats = np.divide(part_R, whole_R, out=np.full_like(part_R, np.nan), where=whole_R > 0)
    return found


def _mean(values_D: NDArray[Any], weights_RD: Floats) -> Floats:
    found: Floats = weights_RD @ values_D.astype(np.float64) / weights_RD.sum(-1)
    return found
