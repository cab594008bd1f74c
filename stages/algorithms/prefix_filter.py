"""Near duplicates by the prefix filter: every pair that is near is found, in about linear time on prose.

Two sets whose Jaccard index is at least t share an element among the rarest |x| - ceil(t |x|) + 1 of each. So only sets
that meet in such a prefix are compared. Elements are numbers of 64 bits: a text's take a quarter of the memory that the
words themselves would, and two runs of words get one number once in 2^64 pairs.

Shapes: W words, S sets, E elements of one set, ascending and each once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]
_ODD = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)
"""Odd multipliers, by which the places of the words in a run tell."""
_WORDS_KEPT = 1 << 18


def shingles(words: Sequence[str], length: int) -> Numbers:
    """The numbers of all runs of `length` words, [E]; the same in every process.

    Args:
        words: W of them.
        length: of a run; of fewer words there is none.
    """
    if len(words) < length:
        return np.empty(0, np.uint64)
    found_W = np.fromiter(map(_number, words), np.uint64, len(words))
    runs = len(words) - length + 1
    made = found_W[:runs].copy()
    for place in range(1, length):
        made = made * np.uint64(_ODD[place % 2]) + found_W[place : place + runs]  # wraps around, as it should
    return np.unique(made)


@lru_cache(maxsize=_WORDS_KEPT)
def _number(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def first_of_each(sets: Sequence[Numbers], threshold: float) -> list[bool]:
    """Which sets to keep so that no two kept ones have a Jaccard index of `threshold` or more.

    A set is left out when an earlier kept one is that close to it. Empty sets are kept: they say nothing.

    Args:
        sets: S sets, each [E].
        threshold: above 0, at most 1.

    Returns:
        S booleans, in order.

    Raises:
        ValueError: the threshold is outside (0, 1].

    Source: Chaudhuri, Ganti, Kaushik, "A primitive operator for similarity joins in data cleaning" (2006), section 4;
    Bayardo, Ma, Srikant, "Scaling up all pairs similarity search" (2007).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    if not sets:
        return []
    elements, frequency = np.unique(np.concatenate(sets), return_counts=True)
    # What stands in one set alone brings it together with no other: it counts in a prefix, but is not looked up.
    elements, frequency = elements[frequency > 1], frequency[frequency > 1]
    holders: defaultdict[int, list[int]] = defaultdict(list)
    keep = []
    for index, one in enumerate(sets):
        # Rounding must not shorten a prefix: 0.7 * 10 is a hair above 7 in floating point.
        needed = math.ceil(threshold * len(one) - 1e-9)
        rarest = _rarest(one, len(one) - needed + 1, elements, frequency)
        near = {other for element in rarest for other in holders.get(element, ())}
        alone = not any(_as_near(one, sets[other], threshold) for other in near)
        if alone:
            for element in rarest:
                holders[element].append(index)
        keep.append(alone)
    return keep


def _rarest(one: Numbers, count: int, elements: Numbers, frequency: NDArray[np.int64]) -> list[int]:
    """Of the rarest elements of a set those that stand in another one as well."""
    if not len(elements):
        return []
    places = np.minimum(np.searchsorted(elements, one), len(elements) - 1)
    common = elements[places] == one
    often = np.where(common, frequency[places], 1)
    first = np.argsort(often, kind="stable")[:count]
    found: list[int] = one[first[common[first]]].tolist()
    return found


def _as_near(a: Numbers, b: Numbers, threshold: float) -> bool:
    less, more = sorted((len(a), len(b)))
    if less / more < threshold:
        return False
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) >= threshold
