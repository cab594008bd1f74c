"""Proof that a graph with a cache writes what the model reads: prompts, single tokens, rows of unequal length.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.adapters.onnxruntime import CachedSession
from stages.export.called import PADDING
from stages.export.checks import Expected, unrounded_session, unrounded_stacks
from stages.graphs.parity import parity, require_parity
from stages.graphs.stepping import by_steps, in_two, said_by_steps
from stages.runtime.contract import StageError
from stages.serving.answering import Manner, whole


def require_kept_numbers(path: Path, ids_NT: NDArray[np.int64], answer_NTV: NDArray[np.float32]) -> float:
    """Compare graph and torch, without the rounding of activations and caches.

    The windows are read as prompts that fill the last place of the cache, the first in two parts, and all of them side
    by side as prompts of unequal length, then token by token, while the cache grows under them.

    Returns:
        The largest logit difference, in standard deviations.

    Raises:
        StageError: they differ.
    """
    session = unrounded_session(path)
    if not isinstance(session, CachedSession):
        raise StageError(f"{path.name} keeps nothing", remedy="Report it with graph.json.")
    worst = 0.0
    for what, wanted, found in (
        ("prompts", answer_NTV, session.logits(ids_NT)),
        ("a prompt in two parts", answer_NTV[:1], in_two(session, ids_NT[:1])),
        ("tokens one by one", answer_NTV, by_steps(session, ids_NT)),
    ):
        difference = parity(ids_NT[: len(found)], wanted, found)
        require_parity(difference, f"{what} in the graph with a cache and the torch model")
        worst = max(worst, difference.logit_difference)
    return worst


def require_answered_numbers(path: Path, ids_NT: NDArray[np.int64], wanted: Expected, how: Manner) -> float:
    """Compare an encoder's graph and a decoder's with torch, without the rounding of activations.

    The decoder is asked for each window that the encoder reads: for all of it at once, and token by token to the last
    place of its cache, each row on a step of its own, with a text beside the others that ends in padding. Padding holds
    tokens like any other: only the mask says that they do not count.

    Returns:
        The largest logit difference, in standard deviations.

    Raises:
        StageError: they differ.
    """
    stacks = unrounded_stacks(path)
    texts_NT = np.concatenate([ids_NT[:1], ids_NT])
    texts_NT[0, -PADDING:] = ids_NT[0, :PADDING]
    mask_NT = np.ones_like(texts_NT)
    mask_NT[0, -PADDING:] = 0
    said_NT = how.shifted(texts_NT, mask_NT.sum(1))
    stepped_NTV = said_by_steps(stacks, texts_NT, mask_NT, said_NT)
    worst = 0.0
    for what, reference, found in (
        ("texts", wanted.answer_N, whole(stacks, how, ids_NT, np.ones_like(ids_NT))),
        ("answers token by token", wanted.answer_N, stepped_NTV[1:]),
        ("an answer to a padded text", wanted.shorter_1, stepped_NTV[:1, :-PADDING]),
    ):
        difference = parity(None, reference, found)
        require_parity(difference, f"{what} in the two graphs and the torch model")
        worst = max(worst, difference.logit_difference)
    return worst
