"""Two plans on a GPU: an encoder's, which reads texts once, and a decoder's, which answers them by a cache of its own.

What the encoder says stays in the GPU's memory, where the decoder looks at it. Rows beyond the plans' batch are groups.

Shapes: N sequences, T new tokens, S tokens of the text, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.tensorrt.build import CROSS, MASK, PREFILL
from stages.adapters.tensorrt.device import Device
from stages.adapters.tensorrt_cache import (
    IDS,
    CachedPlan,
    Kept,
    Lying,
    behind,
    context_of,
    names_of,
    reordered,
    set_shape,
)
from stages.runtime.contract import StageError


class EncoderPlan:
    """A deserialized plan that makes keys and values of texts.

    Args:
        device: the GPU that it was built for.
        engine: TensorRT's.
        alive: what must outlive the engine.
    """

    def __init__(self, device: Device, engine: Any, alive: tuple[Any, ...]) -> None:
        self.device, self._alive, self._context = device, (*alive, engine), context_of(engine, PREFILL)
        self._given = [name for name in names_of(engine) if name.startswith(CROSS)]
        self.item_bytes = {name: int(engine.get_tensor_dtype(name).itemsize) for name in self._given}
        self.item_bytes[MASK] = np.dtype(np.int64).itemsize

    def read(self, ids_NS: NDArray[np.int64], mask_NS: NDArray[np.int64], into: Lying) -> None:
        """Read texts and put what a decoder takes of them `into` what lies on the device; it stays where this fails.

        Raises:
            StageError: the plan has no kernels for a shape, or fails.
            DoesNotFit: memory ran out.
        """
        for name, array_NS in ((IDS, ids_NS), (MASK, mask_NS)):
            set_shape(self._context, name, array_NS.shape)
            into[name] = self.device.upload(np.ascontiguousarray(array_NS)), array_NS.shape
        for name in self._given:
            shape = tuple(self._context.get_tensor_shape(name))
            into[name] = self.device.allocate(int(np.prod(shape)) * self.item_bytes[name]), shape
        for name, (pointer, _) in into.items():
            self._context.set_tensor_address(name, pointer.value)
        if not self._context.execute_async_v3(0):
            raise StageError("the encoder's engine failed to execute", remedy="See the GPU's log with `nvidia-smi`.")
        self.device.wait()
        self.device.release(into.pop(IDS)[0])


@dataclass(frozen=True)
class DeviceStacks:
    """See `stages.adapters.backends.Stacks`."""

    encoder: EncoderPlan
    decoder: CachedPlan

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64], places: int) -> DeviceAnswers:
        """Read the texts; a plan's cache has all its places from the beginning, however few are asked for."""
        kept = []
        for at in self.decoder.groups(len(ids_NT)):
            longest = int(mask_NT[at].sum(1).max())
            kept.append(self.decoder.begin(len(ids_NT[at])))
            self.encoder.read(ids_NT[at, :longest], mask_NT[at, :longest], kept[-1].beside)
        return DeviceAnswers(self, kept, len(ids_NT))


class DeviceAnswers:
    """See `stages.adapters.backends.Begun`; rows of answers are as long as each other.

    Args:
        stacks: both plans.
        kept: what was read of each group of rows.
        rows: N.
    """

    def __init__(self, stacks: DeviceStacks, kept: list[Kept], rows: int) -> None:
        self._encoder, self._decoder = stacks.encoder, stacks.decoder
        self._kept, self._rows, self._length = kept, rows, 0

    def read(self, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read more tokens, in parts of as many as may be asked at once."""
        parts = []
        for start in range(0, ids_NT.shape[1], self._decoder.most_asked):
            part_NT = ids_NT[:, start : start + self._decoder.most_asked]
            parts.append(np.concatenate([self._read(*one, part_NT) for one in self._groups()]))
            self._length += part_NT.shape[1]
        return np.concatenate(parts, axis=1)

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows and their texts, each as often as it is named."""
        before, made = self._kept, reordered(self._decoder, self._kept, rows_N)
        for kept, at in zip(made, self._decoder.groups(len(rows_N)), strict=True):
            self._take_texts(kept, [divmod(row, self._decoder.most_rows) for row in rows_N[at].tolist()])
        self._kept, self._rows = made, len(rows_N)
        for kept in before:
            kept.close()

    def _take_texts(self, kept: Kept, sources: list[tuple[int, int]]) -> None:
        """Copy what the encoder said of rows, each told by its group and its place there, padded on the right."""
        device = self._encoder.device
        longest = max(self._kept[group].beside[MASK][1][1] for group, _ in sources)
        for name, item_bytes in self._encoder.item_bytes.items():
            shape = self._kept[sources[0][0]].beside[name][1]  # [N, S] of the mask, [N, heads, S, size] of the others
            heads, size_bytes = math.prod(shape[1:-2]), math.prod(shape[3:]) * item_bytes
            size = (len(sources), *shape[1:-2], longest, *shape[3:])
            kept.beside[name] = device.zeros(math.prod(size) * item_bytes), size
            for place, (group, row) in enumerate(sources):
                source, (*_, tokens) = self._kept[group].beside[name][0], self._kept[group].beside[MASK][1]
                for head in range(heads):
                    to = behind(kept.beside[name][0], (place * heads + head) * longest * size_bytes)
                    at = behind(source, (row * heads + head) * tokens * size_bytes)
                    device.copy(to, at, tokens * size_bytes)

    def _groups(self) -> list[tuple[Kept, slice]]:
        return list(zip(self._kept, self._decoder.groups(self._rows), strict=True))

    def _read(self, kept: Kept, at: slice, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        rows_NT = ids_NT[at]
        asked_NK = np.tile(np.arange(rows_NT.shape[1]), (len(rows_NT), 1))
        return self._decoder.read(kept, rows_NT, np.full(len(rows_NT), self._length), asked_NK)
