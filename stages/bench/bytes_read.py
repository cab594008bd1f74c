"""What a token must read at least, and how fast this machine moves bytes."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

COPIED_BYTES = 128 * 2**20
"""Far more than any cache of a processor holds."""
_GATHERS = ("Gather", "GatherBlockQuantized")


def weight_bytes(folder: Path) -> int:
    """Bytes of an artifact's weights that a token reads, as its files store them.

    A table that is only looked up is left out, since a token reads one row of it. Of a mixture of experts all are
    counted.
    """
    from stages.measures.size import size_bytes

    whole = size_bytes({one.name: one.stat().st_size for one in folder.iterdir() if one.is_file()})
    graph = folder / "model.onnx"
    if graph.is_file():
        return whole - _looked_up_by_graph(graph)
    return whole - _looked_up_by_checkpoint(folder)


def _looked_up_by_graph(path: Path) -> int:
    from stages.graphs import onnx_graph

    found = 0
    for value in onnx_graph.load(path).graph.initializers.values():
        uses = [(user.op_type, place) for user, place in value.uses()]
        if value.const_value is not None and uses and all(op in _GATHERS and place == 0 for op, place in uses):
            found += value.const_value.nbytes
    return found


def _looked_up_by_checkpoint(folder: Path) -> int:
    """Of two tables as long as the vocabulary one is the head's, which is read whole; a single one serves as both."""
    from stages.models.checkpoint.files import weight_files
    from stages.models.checkpoint.layout import read_header

    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    tensors = [one for path in weight_files(folder) for one in read_header(path).values()]
    tables = sorted(_bytes(one) for one in tensors if len(one["shape"]) == 2 and one["shape"][0] == vocabulary)
    return tables[-1] if len(tables) > 1 else 0


def _bytes(header: dict[str, Any]) -> int:
    begin, end = header["data_offsets"]
    return int(end) - int(begin)


def copy_bytes_per_s(threads: int, copied_bytes: int = COPIED_BYTES) -> float:
    """Bytes that are read and written in a second where memory is copied, by so many threads at once: STREAM's Copy.

    The best of three passes: what another process takes meanwhile is none of the machine's.
    """
    source, target = np.ones(copied_bytes // 8), np.empty(copied_bytes // 8)
    ends = [len(source) * at // threads for at in range(threads + 1)]
    parts = [slice(*pair) for pair in pairwise(ends)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):  # the first touches the pages
            began = time.perf_counter()
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
            best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best
