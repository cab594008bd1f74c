"""Whole windows read through a cache in parts, for comparison with what reads them at once.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import Execution
from stages.adapters.onnxruntime import CachedSession, Kept, Session, open_session
from stages.adapters.onnxruntime_slots import StackSessions, open_stacks
from stages.graphs.parity import halves

STEPS = 32
"""Tokens at most that are read one by one."""
UNLIKE = 3
"""How many tokens each row's prompt is shorter than that of the row before."""


def by_steps(session: CachedSession, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
    """logits_NTV of windows whose beginnings are read side by side, as long as no other's, and the rest one by one."""
    return _by_steps(lambda places: session.begin(len(ids_NT), places), ids_NT)


def _by_steps(begin: Callable[[int], Kept], ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
    rows, tokens = ids_NT.shape
    longest = max(tokens - STEPS, tokens // 2, 1)
    first_N = np.array([max(1, longest - UNLIKE * (row % 4)) for row in range(rows)])
    kept = begin(int(first_N.max()))
    begun_NTV = kept.read(ids_NT[:, : first_N.max()], first_N)
    logits_NTV = np.zeros((rows, tokens, begun_NTV.shape[2]), np.float32)
    for row, count in enumerate(first_N):
        logits_NTV[row, :count] = begun_NTV[row, :count]
    while (kept.lengths_N < tokens).any():
        # A row that is through reads its last token again.
        kept.lengths_N = at_N = np.minimum(kept.lengths_N, tokens - 1)
        said_NV = kept.read(ids_NT[np.arange(rows), at_N][:, None])[:, 0]
        logits_NTV[np.arange(rows), at_N] = said_NV
    return logits_NTV


def said_by_steps(
    stacks: StackSessions, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], said_NT: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The same of answers to texts."""
    return _by_steps(lambda places: stacks.begin(ids_NT, mask_NT, places), said_NT)


def in_two(session: CachedSession, ids_1T: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same of one window in two parts."""
    kept, half = session.begin(1, ids_1T.shape[1]), ids_1T.shape[1] // 2 or 1
    parts = [kept.read(part) for part in (ids_1T[:, :half], ids_1T[:, half:]) if part.shape[1]]
    return np.concatenate(parts, axis=1)


def at_once(opened: Execution, ids_NT: NDArray[np.int64], said_NT: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """What an engine answers to whole windows, by what its decoder reads if it has one behind an encoder."""
    if opened.stacks is not None and said_NT is not None:
        return opened.stacks.begin(ids_NT, np.ones_like(ids_NT), said_NT.shape[1]).read(said_NT)
    assert opened.forward is not None
    segments = [halves(ids_NT)] if opened.tells_segments else []
    return opened.forward(ids_NT, np.ones_like(ids_NT), *segments)


def outputs(session: Session | CachedSession, ids_NT: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Every output of a graph that reads whole windows, by its name; their halves are two segments where it asks."""
    return session.outputs(ids_NT, None, halves(ids_NT)) if isinstance(session, Session) else session.outputs(ids_NT)


def one_by_one(path: Path, ids_NT: NDArray[np.int64], said_NT: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """The same through the cache of a graph in parts."""
    if said_NT is not None:
        return said_by_steps(open_stacks(path), ids_NT, np.ones_like(ids_NT), said_NT)
    session = open_session(path)
    assert isinstance(session, CachedSession)
    return by_steps(session, ids_NT)
