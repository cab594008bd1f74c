"""Near duplicates by the prefix filter: exact, without hashing error, in about linear time on prose.

Two sets whose Jaccard index is at least t share an element among the rarest |x| - ceil(t |x|) + 1 of each. So only sets
that meet in such a prefix are compared.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet


def first_of_each(sets: Sequence[AbstractSet[Hashable]], threshold: float) -> list[bool]:
    """Which sets to keep so that no two kept ones have a Jaccard index of `threshold` or more.

    A set is left out when an earlier kept one is that close to it. Empty sets are kept: they say nothing.

    Args:
        sets: S sets of hashable, mutually ordered elements.
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
    frequency = Counter(element for one in sets for element in one)
    holders: defaultdict[Hashable, list[int]] = defaultdict(list)
    keep = []
    for index, one in enumerate(sets):
        # Rounding must not shorten a prefix: 0.7 * 10 is a hair above 7 in floating point.
        needed = math.ceil(threshold * len(one) - 1e-9)
        rarest = sorted(one, key=lambda element: (frequency[element], element))[: len(one) - needed + 1]
        near = {other for element in rarest for other in holders[element]}
        alone = not any(_jaccard(one, sets[other]) >= threshold for other in near)
        if alone:
            for element in rarest:
                holders[element].append(index)
        keep.append(alone)
    return keep


def _jaccard(a: AbstractSet[Hashable], b: AbstractSet[Hashable]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
