"""What plans hold, read from their bytes: their graphs' weights, each once, and little besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from stages.graphs import onnx_graph
from stages.runtime.contract import Metrics, Progress

BESIDES_BYTES = 24_000_000
"""What a plan usually takes beyond its weights: the text of its kernels."""
_LEAST_BYTES, _SEEN_BYTES = 4096, 64
"""Weights that are looked for, and how many bytes of a line of theirs are."""
_WORD = 4
"""Lines begin at multiples of it."""
_AT_ONCE = 1 << 24
"""Words."""


def measure(models: Sequence[ir.Model], plans: Sequence[Path], progress: Progress) -> Metrics:
    """Look for every weight of graphs in their plans, by a line in the middle of its rows and one of its columns.

    Builders put weights that are multiplied with one input side by side, and may store a matrix transposed: lines stay
    whole. What is packed otherwise is not found.
    """
    held = onnx_graph.size_bytes(*models)
    weights = [one for model in models for one in _weights(model)]
    lines = {name: _lines(tensor) for name, tensor in weights}
    sought = {line for some in lines.values() for line in some}
    times = sum((_times(np.memmap(plan, np.uint8, "r"), sought) for plan in plans), Counter[bytes]())
    owners = Counter(line for some in lines.values() for line in set(some))
    sizes = {name: tensor.nbytes for name, tensor in weights}
    found = {name: sum(times[line] / owners[line] for line in set(some)) for name, some in lines.items()}
    twice = sorted(name for name, count in found.items() if count > 1)
    besides = sum(plan.stat().st_size for plan in plans) - held
    if twice:
        progress.note(f"the plan holds {len(twice)} weights more than once: {', '.join(twice[:5])}")
    if besides > BESIDES_BYTES * len(plans) + sum(sizes[name] for name in twice):
        progress.note(
            f"the plan takes {besides / 1e6:.1f} MB beyond its weights, where {BESIDES_BYTES / 1e6:.0f} are usual: "
            "each profile has kernels of its own for every width and every scale"
        )
    return {
        "weights_bytes": float(held),
        "besides_weights_bytes": float(besides),
        "weights_found": sum(count > 0 for count in found.values()) / max(1, len(found)),
        "stored_again_bytes": float(sum(sizes[name] for name in twice)),
    }


def _weights(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value  # vectors, as of scales, a builder multiplies with each other
        if tensor is not None and tensor.nbytes >= _LEAST_BYTES and len(tensor.shape) > 1:
            yield name, tensor


def _lines(tensor: ir.TensorProtocol) -> tuple[bytes, ...]:
    """The beginning of the middle row and of the middle column, where they say anything."""
    if tensor.dtype.bitwidth < 8 or len(tensor.shape) != 2:
        data = tensor.tobytes()
        middle = len(data) // 2 // _WORD * _WORD
        found = [data[middle : middle + _SEEN_BYTES]]
    else:
        w_IO = tensor.numpy()
        w_IO = w_IO.view(np.uint8) if w_IO.dtype.itemsize == 1 else w_IO
        found = [w_IO[len(w_IO) // 2].tobytes()[:_SEEN_BYTES], w_IO[:, w_IO.shape[1] // 2].tobytes()[:_SEEN_BYTES]]
    return tuple(line for line in found if len(line) == _SEEN_BYTES and len(set(line)) > _WORD)


def _times(data: NDArray[np.uint8], lines: set[bytes]) -> Counter[bytes]:
    """How often each line stands in the data, at multiples of a word."""
    by_word: dict[int, list[bytes]] = {}
    for line in lines:
        by_word.setdefault(int.from_bytes(line[:_WORD], "little"), []).append(line)
    wanted = np.array(sorted(by_word), np.uint32)
    # Most words are none of those by half of their bits alone; only the rest is looked up.
    likely = np.zeros(1 << 16, bool)
    likely[wanted & 0xFFFF] = True
    words = data[: len(data) // _WORD * _WORD].view(np.uint32)
    times: Counter[bytes] = Counter()
    for start in range(0, len(words), _AT_ONCE):
        some = words[start : start + _AT_ONCE]
        places = np.flatnonzero(likely[some & 0xFFFF])
        for place in places[np.isin(some[places], wanted)].tolist():
            at = (start + place) * _WORD
            begun = data[at : at + _SEEN_BYTES].tobytes()
            times.update(line for line in by_word[int(some[place])] if line == begun)
    return times
