"""A measure over documents with its interval: by itself, over another's on the same documents, or between the two.

Shapes: D documents, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.measures.interval import Floats, Interval, bootstrap, resampled
from stages.measures.item_scores import columns, function_of
from stages.measures.table import MEASURES, Measure

Document = Mapping[str, Any]


def of_documents(measure: Measure, ours: Sequence[Document], theirs: Sequence[Document] | None) -> Interval:
    """A measure of documents, its ratio to another's on the same ones, or what it counts between the two.

    Args:
        measure: of the table.
        ours: documents of the artifact.
        theirs: those of what it is compared with, in the same order.
    """
    if not measure.of_items:
        tokens_D, ours_D = (_numbers(ours, key) for key in ("tokens", measure.score))
        theirs_D = None if theirs is None else _numbers(theirs, measure.score)
        return bootstrap(tokens_D, ours_D, theirs_D, exponential=measure.exponential)
    function = function_of(measure)
    first, counts_D = _alike(measure, ours, theirs)
    mine = columns([ours[at] for at in first])
    if theirs is None:
        return resampled(counts_D, lambda weights_RD: function(mine, weights_RD))
    other = columns([theirs[at] for at in first])
    if measure.between:
        return resampled(counts_D, lambda weights_RD: function(mine, other, weights_RD))

    def ratio(weights_RD: Floats) -> Floats:
        below_R = function(other, weights_RD)
        # Of nothing there is no share; what knows as little as a guess is seen to before.
        return np.where(below_R > 0, function(mine, weights_RD) / np.where(below_R > 0, below_R, 1), np.nan)

    return resampled(counts_D, ratio)


def value_of(measure: Measure, documents: Sequence[Document]) -> float:
    """A measure of items without its interval, which takes a thousand times as long."""
    return float(function_of(measure)(columns(documents), np.ones((1, len(documents))))[0])


def _alike(measure: Measure, ours: Sequence[Document], theirs: Sequence[Document] | None) -> tuple[list[int], Floats]:
    """The first of each kind of documents that a measure cannot tell apart, and how many there are."""
    keys = (measure.score, *measure.reads)
    pairs = zip(ours, theirs if theirs is not None else ours, strict=True)
    kinds = [tuple(_hashable(one.get(key)) for one in pair for key in keys) for pair in pairs]
    counts, first = Counter(kinds), {kind: place for place, kind in reversed([*enumerate(kinds)])}
    return [first[kind] for kind in counts], np.array([*counts.values()], dtype=np.float64)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _numbers(documents: Sequence[Document], key: str) -> Floats:
    return np.array([document[key] for document in documents], dtype=np.float64)


def above_chance(documents: Sequence[Document], measure: Measure | None = None) -> bool:
    """Whether items are answered better than a guess would, at the low end of the interval.

    By a measure to which an item is not right or wrong, or of items that are neither: whether there is any of it. Of
    pairs of texts it is whether those are nearer which people find nearer.
    """
    if all("right" not in one for one in documents) and all("gold" in one for one in documents):
        return of_documents(MEASURES["spearman"], documents, None).low > 0
    rightly = all("right" in one for one in documents) and not (measure and measure.graded)
    return of_documents(MEASURES["above_chance"] if rightly or not measure else measure, documents, None).low > 0


def slices(documents: Sequence[Document]) -> dict[str, list[int]]:
    """Slice -> the places of its documents."""
    found: dict[str, list[int]] = {}
    for place, document in enumerate(documents):
        if name := document.get("slice"):
            found.setdefault(name, []).append(place)
    return found
