"""Generation over anything that gives logits: greedy, or by whatever chooses the next token.

Where nothing keeps keys and values each new token reads the whole prefix again: the cost of a long answer grows with
the square of its length.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Forward, Steps
from stages.runtime.contract import StageError

ROWS = 8
"""Sequences that are read side by side: the batch that a TensorRT plan takes unless it was told otherwise."""
Enough = Callable[[int, list[int]], bool]
"""(number of the prompt, its new tokens) -> whether no more of it is wanted."""
Choose = Callable[[int, Sequence[int], NDArray[np.float32]], int]
"""(number of the prompt, its tokens and the new ones, logits_V of what comes next) -> the token that comes next."""
Weigh = Callable[[int, Sequence[int], NDArray[np.float32]], NDArray[np.float32]]
"""(number of the prompt, its new tokens, score_V of what comes next) -> the scores that are compared."""


def never(number: int, new: list[int]) -> bool:
    """All that is asked for is wanted."""
    return False


def likeliest(number: int, row: Sequence[int], logits_V: NDArray[np.float32]) -> int:
    """The token with the largest logit; see Choose."""
    return int(logits_V.argmax())


def as_told(number: int, new: Sequence[int], score_V: NDArray[np.float32]) -> NDArray[np.float32]:
    """See Weigh; what the model says."""
    return score_V


@dataclass(frozen=True)
class Weighed:
    """A model, and what its settings allow; see `stages.serving.engine.Answerer.weighing`."""

    model: Forward | Steps
    weigh: Weigh


def greedy(
    model: Forward | Steps | Weighed,
    prompts: Sequence[Sequence[int]],
    *,
    ends: frozenset[int],
    max_new_tokens: int | Sequence[int],
    maximum_tokens: int,
    begun: Sequence[Sequence[int]] = (),
    enough: Enough = never,
) -> list[list[int]]:
    """The most likely next token, again and again, for several prompts at once.

    Args:
        model: what answers to whole sequences, or keeps what it has read; perhaps with what its settings allow.
        prompts: token ids, at least one each.
        ends: tokens that end a sequence; they stand in the result.
        max_new_tokens: at most this many new tokens a prompt, or of each prompt.
        maximum_tokens: the longest sequence that the model reads; generation stops there.
        begun: the first new tokens of each prompt, where they are known; see `confirmed`.
        enough: ends a sequence.

    Returns:
        The new tokens of each prompt, in the prompts' order.
    """
    new = [list(one) for one in begun] or [[] for _ in prompts]
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    most = [min(one, maximum_tokens - len(prompt)) for one, prompt in zip(most, prompts, strict=True)]

    def goes_on(number: int) -> bool:
        row = new[number]
        return len(row) < most[number] and not (row and (row[-1] in ends or enough(number, row)))

    said, weigh = (model.model, model.weigh) if isinstance(model, Weighed) else (model, as_told)

    def allowed(number: int, row: Sequence[int], logits_V: NDArray[np.float32]) -> int:
        return int(weigh(number, row[len(prompts[number]) :], logits_V).argmax())

    for _ in written(said, prompts, new, goes_on, allowed):
        pass
    return new


def written(
    model: Forward | Steps,
    prompts: Sequence[Sequence[int]],
    new: Sequence[list[int]],
    goes_on: Callable[[int], bool],
    choose: Choose,
) -> Iterator[int]:
    """Continue several prompts side by side, a token of each at a time.

    Args:
        model: what answers to whole sequences, or keeps what it has read.
        prompts: token ids, at least one each.
        new: the new tokens of each prompt so far; those that come are put behind them.
        goes_on: whether another token of a prompt is wanted.
        choose: what comes next.

    Yields:
        The number of a prompt, once a token of it has come.
    """
    alive = [number for number in range(len(prompts)) if goes_on(number)]
    follow = _Rereading(model) if callable(model) else _Stepping(model)
    while alive:
        rows = {one: [*prompts[one], *new[one]] for one in alive}
        for number, logits_V in follow.logits(rows):
            new[number].append(choose(number, rows[number], logits_V))
            yield number
        alive = [number for number in alive if goes_on(number)]


class _Rereading:
    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def logits(self, rows: dict[int, list[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        numbers = [*rows]
        for some in (numbers[start : start + ROWS] for start in range(0, len(numbers), ROWS)):
            logits_NTV = self.forward(*padded([rows[one] for one in some]))
            for one, logits_TV in zip(some, logits_NTV, strict=True):
                yield one, logits_TV[len(rows[one]) - 1]


class _Stepping:
    def __init__(self, steps: Steps) -> None:
        self.steps, self.places, self.thinned = steps, dict[int, int](), True

    def logits(self, rows: dict[int, list[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if not self.places:
            self.places = {number: place for place, number in enumerate(rows)}
            logits_NV = self.steps.begin(*padded([*rows.values()], left=True))
        else:
            if self.thinned and len(rows) <= len(self.places) // 2:
                self._thin([*rows])
            # What has ended since is led on with any token: to give up its place costs as much as a token does.
            tokens_N = np.zeros(len(self.places), dtype=np.int64)
            for number, row in rows.items():
                tokens_N[self.places[number]] = row[-1]
            logits_NV = self.steps.next(tokens_N)
        for number in rows:
            yield number, logits_NV[self.places[number]]

    def _thin(self, numbers: list[int]) -> None:
        """Go on with these alone, where what was read lets rows be chosen."""
        try:
            self.steps.reorder(np.array([self.places[number] for number in numbers]))
        except StageError:
            # A model keeps what it has read in a way of its own, or a second cache has no room: all go on as they were.
            self.thinned = False
        else:
            self.places = {number: place for place, number in enumerate(numbers)}


def confirmed(
    logits_TV: NDArray[np.float32],
    draft: Sequence[int],
    ends: frozenset[int],
    enough: Callable[[list[int]], bool],
    weigh: Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]] | None = None,
) -> list[int]:
    """The tokens that a model says by one pass over a guess: all that the guess has right, and one of its own.

    Args:
        logits_TV: of the prompt's last token and of each of the draft's.
        draft: the guess.
        ends: tokens that end a sequence.
        enough: ends it, too.
        weigh: what settings allow behind its new tokens.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023, with a guess in the
    place of the small model.
    """
    new: list[int] = []
    for place, logits_V in enumerate(logits_TV):
        token = int((logits_V if weigh is None else weigh(new, logits_V)).argmax())
        new.append(token)
        if token in ends or enough(new) or (place < len(draft) and token != draft[place]):
            break
    return new


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids_NT and mask_NT of rows that end apart: what comes later changes nothing for a model that reads from the left.

    Args:
        rows: token ids.
        left: have all rows end together instead.
    """
    longest = max(len(row) for row in rows)
    ids_NT = np.zeros((len(rows), longest), dtype=np.int64)
    mask_NT = np.zeros_like(ids_NT)
    for ids_T, mask_T, row in zip(ids_NT, mask_NT, rows, strict=True):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids_T[at] = row
        mask_T[at] = 1
    return ids_NT, mask_NT
