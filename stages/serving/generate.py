"""Greedy generation over anything that gives logits.

Each new token reads the whole prefix again, since the graphs have no key-value cache: the cost of a long answer grows
with the square of its length.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Forward


def greedy(
    forward: Forward, prompts: list[list[int]], *, ends: frozenset[int], max_new_tokens: int, maximum_tokens: int
) -> list[list[int]]:
    """The most likely next token, again and again, for several prompts at once.

    Args:
        forward: the model.
        prompts: token ids, at least one each.
        ends: tokens that end a sequence; they stand in the result.
        max_new_tokens: at most this many new tokens a prompt.
        maximum_tokens: the longest sequence that the model reads; generation stops there.

    Returns:
        The new tokens of each prompt, in the prompts' order.
    """
    rows = [list(prompt) for prompt in prompts]
    alive = [number for number, row in enumerate(rows) if len(row) < maximum_tokens]
    for _ in range(max_new_tokens):
        if not alive:
            break
        ids_NT, mask_NT = _left_padded([rows[number] for number in alive])
        chosen_N = forward(ids_NT, mask_NT)[:, -1].argmax(axis=-1)
        for number, token in zip(alive, chosen_N.tolist(), strict=True):
            rows[number].append(token)
        alive = [number for number in alive if rows[number][-1] not in ends and len(rows[number]) < maximum_tokens]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _left_padded(rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    longest = max(len(row) for row in rows)
    ids_NT = np.zeros((len(rows), longest), dtype=np.int64)
    mask_NT = np.zeros_like(ids_NT)
    for ids_T, mask_T, row in zip(ids_NT, mask_NT, rows, strict=True):
        ids_T[longest - len(row) :] = row
        mask_T[longest - len(row) :] = 1
    return ids_NT, mask_NT
