"""Proof that a graph with a cache writes what the model reads: prompts, single tokens, rows of unequal length.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.adapters.onnxruntime import CachedSession
from stages.export.checks import unrounded_session
from stages.graphs.parity import parity, require_parity
from stages.graphs.stepping import by_steps, in_two
from stages.runtime.contract import StageError


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
