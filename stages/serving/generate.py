"""Greedy generation over anything that gives logits.

Each new token reads the whole prefix again, since the graphs have no key-value cache: the cost of a long answer grows
with the square of its length. A draft of what will be said saves that where it is right (Leviathan et al., Fast
Inference from Transformers via Speculative Decoding, 2023, with a guess in the place of the small model): one pass
confirms all its tokens, and the first that is another one is the model's own.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Forward


def greedy(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    *,
    ends: frozenset[int],
    max_new_tokens: int | Sequence[int],
    maximum_tokens: int,
    drafts: Sequence[Sequence[int]] = (),
    enough: Callable[[int, list[int]], bool] = lambda number, new: False,
) -> list[list[int]]:
    """The most likely next token, again and again, for several prompts at once.

    Args:
        forward: the model.
        prompts: token ids, at least one each.
        ends: tokens that end a sequence; they stand in the result.
        max_new_tokens: at most this many new tokens a prompt, or of each prompt.
        maximum_tokens: the longest sequence that the model reads; generation stops there.
        drafts: for each prompt what may be said, which changes nothing but the time.
        enough: (number of the prompt, its new tokens) -> whether no more of it is wanted.

    Returns:
        The new tokens of each prompt, in the prompts' order.
    """
    new: list[list[int]] = [[] for _ in prompts]
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    most = [min(one, maximum_tokens - len(prompt)) for one, prompt in zip(most, prompts, strict=True)]
    ahead = [list(one) for one in drafts] or [[] for _ in prompts]
    alive = [number for number in range(len(prompts)) if most[number] > 0]
    while alive:
        ahead = [draft[: most[number] - len(new[number]) - 1] for number, draft in enumerate(ahead)]
        ids_NT, mask_NT = padded([[*prompts[one], *new[one], *ahead[one]] for one in alive])
        logits_NTV = forward(ids_NT, mask_NT)
        still = []
        for logits_TV, number in zip(logits_NTV, alive, strict=True):
            last = len(prompts[number]) + len(new[number]) - 1
            said = logits_TV[last : last + len(ahead[number]) + 1].argmax(axis=-1).tolist()
            if _taken(said, ahead[number], new[number], ends, partial(enough, number)):
                continue
            if len(new[number]) < most[number]:
                still.append(number)
        alive = still
    return new


def _taken(
    said: list[int], ahead: list[int], new: list[int], ends: frozenset[int], enough: Callable[[list[int]], bool]
) -> bool:
    """Append what the model says, as far as the draft was what it says; returns whether the sequence is at its end."""
    drafted, ahead[:] = list(ahead), []
    for place, token in enumerate(said):
        new.append(token)
        if token in ends or enough(new):
            return True
        if place < len(drafted) and token != drafted[place]:
            return False
    return False


def padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that end apart: what comes later changes nothing for a model that reads from the left."""
    longest = max(len(row) for row in rows)
    ids_NT = np.zeros((len(rows), longest), dtype=np.int64)
    mask_NT = np.zeros_like(ids_NT)
    for ids_T, mask_T, row in zip(ids_NT, mask_NT, rows, strict=True):
        ids_T[: len(row)] = row
        mask_T[: len(row)] = 1
    return ids_NT, mask_NT
