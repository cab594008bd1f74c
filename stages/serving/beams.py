"""Beam search: several beginnings of an answer are followed at once, and the one that is likeliest as a whole is said.

As transformers has it: twice as many candidates as beams, those that end are compared by their mean to a power, and the
search ends where no beginning can come to more.

Shapes: N sequences, B beams of each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Steps
from stages.runtime.contract import StageError
from stages.serving.generate import ROWS, Weigh, as_told, padded
from stages.serving.generation import MOST_BEAMS, Generation
from stages.serving.sampling import log_probabilities

_NONE = np.float32(-1e9)
"""The score of a beam that is none: one beginning is followed first, not the same one B times."""
Ended = Callable[[list[int]], bool]
"""(new tokens) -> whether an answer ends with them, beside those that end with a token of its own."""


@dataclass(frozen=True)
class Beams:
    """How an answer is searched.

    Attributes:
        count: beginnings that are followed at once; 1 takes the likeliest token each time.
        length_penalty: an answer is worth the sum of its tokens' log-probabilities over its length to this power.
        early_stopping: true ends with as many answers as beams, false where the best beginning is worth less than the
            worst of them as long as it is, `never` where it is even as long as it may get.
        last: tokens that an answer ends with at the latest, in the last place that it may have; none for any. They are
            no part of what is found, by beams or without: one token less is all that it may have.
    """

    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    last: tuple[int, ...] = ()


def beams_of(settings: Mapping[str, Any], task: str) -> Beams:
    """As generation_config.json says it; a decoder follows one beam unless it is asked for more.

    Raises:
        StageError: it says what is none.
    """
    defaults: dict[str, Any] = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
    told = {name: one if (given := settings.get(name)) is None else given for name, one in defaults.items()}
    count, penalty, early = told.values()
    count = count if task == "translate" else 1
    whole = isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= MOST_BEAMS
    real = isinstance(penalty, int | float) and not isinstance(penalty, bool) and math.isfinite(penalty)
    if not (whole and real and (isinstance(early, bool) or early == "never")):
        raise StageError(
            "the settings of generation ask for beams that are none",
            measured=", ".join(f"{name} {value!r:.60}" for name, value in told.items()),
            limit=f"num_beams 1 to {MOST_BEAMS}; a number; true, false or never",
            remedy="Correct generation_config.json.",
        )
    return Beams(count, float(penalty), early, _last(settings))


def _last(settings: Mapping[str, Any]) -> tuple[int, ...]:
    told = settings.get("forced_eos_token_id")
    ends = [] if told is None else told if isinstance(told, list) else [told]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in ends):
        raise StageError(
            "a token that answers are to end with is none",
            measured=f"forced_eos_token_id: {told!r:.60}",
            limit="a whole number from 0 on, or a list of them",
            remedy="Correct generation_config.json.",
        )
    return tuple(ends)


class _Scoring:
    """See `stages.adapters.backends.Steps`; what comes next is told by log-probabilities."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self.reorder = steps, steps.reorder

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read prompts."""
        return log_probabilities(self._steps.begin(ids_NT, mask_NT))

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        return log_probabilities(self._steps.next(tokens_N))


def scoring(begin: Callable[[], Steps] | None) -> Callable[[], Steps] | None:
    """What keeps what it reads, told by log-probabilities."""
    return None if begin is None else lambda: _Scoring(begin())


def never(new: list[int]) -> bool:
    """No answer ends but by a token of its own."""
    return False


def chosen(how: Generation, settings: Beams, *, follows: bool, kept: bool) -> Beams:
    """How answers are searched.

    Args:
        how: they are asked for.
        settings: of the checkpoint.
        follows: they hold where nothing is said and nothing drawn.
        kept: the model keeps what it has read.

    Raises:
        StageError: by beams, and nothing is kept.
    """
    default = settings.count if follows and kept and how.temperature == 0 else 1
    found = replace(settings, count=how.beams or default)
    if found.count > 1 and not kept:
        raise StageError(
            "the model keeps nothing of what it has read, and beams go on from that",
            measured=f"{found.count} beams",
            limit="1",
            remedy="Ask without beams, or export and compile it with a cache.",
        )
    return found


def refuse_pieces(how: Generation) -> None:
    """Raise StageError where an answer is asked for in pieces and by beams."""
    if (how.beams or 1) > 1:
        raise StageError(
            "an answer by beams is known when it has ended, and comes in no pieces",
            measured=f"{how.beams} beams",
            limit="1",
            remedy="Ask for the whole answer, or without beams.",
        )


def searched(
    begin: Callable[[], Steps],
    prompts: Sequence[Sequence[int]],
    how: Beams,
    *,
    ends: frozenset[int],
    most: Sequence[int],
    ended: Ended = never,
    weigh: Weigh = as_told,
) -> list[list[int]]:
    """The answer to each prompt that is worth most; it is the one that the prompt gets alone.

    Args:
        begin: what says log-probabilities; some prompts at once, so that their beams are no more than ROWS.
        prompts: token ids, at least one each.
        how: is searched.
        ends: tokens that end an answer; they stand in the result.
        most: at most so many new tokens of each prompt.
        ended: ends an answer, too.
        weigh: what is compared of what the model says.
    """
    searches = [_Search(how, limit, ends, ended) for limit in most]
    asked, at_once = [one for one, limit in enumerate(most) if limit > 0], max(1, ROWS // how.count)
    for some in (asked[start : start + at_once] for start in range(0, len(asked), at_once)):
        scores = begin()
        said_NV = scores.begin(*padded([prompts[one] for one in some], left=True))
        # Of one row there are as many beginnings as beams, and none of what is answered.
        places = {number: [row] * how.count for row, number in enumerate(some)}
        while places:
            rows, tokens, after = list[int](), list[int](), dict[int, list[int]]()
            for number, place_B in places.items():
                one = searches[number]
                told = [weigh(number, line, said_NV[at]) for line, at in zip(one.lines, place_B, strict=True)]
                going = one.advance(np.stack(told))
                if not one.done:
                    after[number] = [*range(len(rows), len(rows) + how.count)]
                    rows += [place_B[beam] for beam, _ in going]
                    tokens += [token for _, token in going]
            if after:
                scores.reorder(np.array(rows))
                said_NV = scores.next(np.array(tokens, np.int64))
            places = after
    return [one.best for one in searches]


class _Search:
    """The beams of one prompt.

    Attributes:
        lines: the tokens of each, the best first.
        done: nothing better can come.

    Source: Graves 2012, Sequence Transduction with Recurrent Neural Networks; Wu et al. 2016, Google's Neural Machine
    Translation System, section 7, with the length itself in place of its penalty.
    """

    def __init__(self, how: Beams, most: int, ends: frozenset[int], ended: Ended) -> None:
        self._how, self._most, self._ends, self._ended = how, most + bool(how.last), ends, ended
        self.lines, self.done = [list[int]() for _ in range(how.count)], False
        self._score_B = np.full(how.count, _NONE)
        self._score_B[0] = 0
        self._whole = list[tuple[np.float32, list[int]]]()

    @property
    def best(self) -> list[int]:
        """The answer, once it is done."""
        found = self._whole[0][1] if self._whole else []
        return found[: self._most - bool(self._how.last)]

    def advance(self, score_BV: NDArray[np.float32]) -> list[tuple[int, int]]:
        """Go on by a token; the beam that each beam comes from, and its token."""
        count, vocabulary = score_BV.shape
        if self._how.last and len(self.lines[0]) == self._most - 1:
            score_BV = np.full_like(score_BV, _NONE)
            score_BV[:, list(self._how.last)] = 0
        sums = (score_BV + self._score_B[:, None]).ravel()
        # So many that a beam which does not end stands behind each that may.
        best = _largest(sums, max(2, 1 + len(self._ends)) * count)
        lines = [[*self.lines[at // vocabulary], at % vocabulary] for at in best]
        length = len(lines[0])
        over = [length >= self._most or line[-1] in self._ends or self._ended(line) for line in lines]
        self._keep([(sums[at] / self._worth(length), line) for at, line in zip(best, lines, strict=True)], over)
        left = sums[best] + np.where(over, _NONE, np.float32(0))
        going = _largest(left, count)
        self._score_B, self.lines = left[going], [lines[at] for at in going]
        self.done = all(over) or not self._may_improve(length)
        return [(best[at] // vocabulary, best[at] % vocabulary) for at in going]

    def _keep(self, found: list[tuple[np.float32, list[int]]], over: list[bool]) -> None:
        """Those of the best beams that have ended, among the best answers."""
        new = [one for one, ends in zip(found[: self._how.count], over, strict=False) if ends]
        self._whole = sorted([*self._whole, *new], key=lambda one: -one[0])[: self._how.count]

    def _may_improve(self, length: int) -> bool:
        if len(self._whole) < self._how.count:
            return bool(self._score_B[0] > _NONE)
        if self._how.early_stopping is True:
            return False
        longest = self._how.early_stopping == "never" and self._how.length_penalty > 0
        return bool(self._score_B[0] / self._worth(self._most if longest else length) > self._whole[-1][0])

    def _worth(self, length: int) -> np.float32:
        return np.float32(float(length) ** self._how.length_penalty)


def _largest(values: NDArray[np.float32], count: int) -> list[int]:
    """Places of the largest values, the largest first, of equal ones the first."""
    count = min(count, len(values))
    places = np.sort(np.argpartition(-values, count - 1)[:count])
    found: list[int] = places[np.argsort(-values[places], kind="stable")].tolist()
    return found
