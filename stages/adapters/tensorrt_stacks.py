"""Two plans on a GPU: an encoder's, which reads texts once, and a decoder's, which answers them by a cache of its own.

What the encoder says stays in the GPU's memory, where the decoder looks at it. Rows beyond the plans' batch are groups.

Shapes: N sequences, T new tokens, S tokens of the text, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.tensorrt.build import CROSS, MASK, PREFILL
from stages.adapters.tensorrt.device import Device
from stages.adapters.tensorrt_cache import IDS, CachedPlan, Kept, Lying, context_of, names_of, set_shape
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
        self._item_bytes = {
            name: int(engine.get_tensor_dtype(name).itemsize) for name in names_of(engine) if name.startswith(CROSS)
        }

    def read(self, ids_NS: NDArray[np.int64], mask_NS: NDArray[np.int64], into: Lying) -> None:
        """Read texts and put what a decoder takes of them `into` what lies on the device; it stays where this fails.

        Raises:
            StageError: the plan has no kernels for a shape, or fails.
            DoesNotFit: memory ran out.
        """
        for name, array_NS in ((IDS, ids_NS), (MASK, mask_NS)):
            set_shape(self._context, name, array_NS.shape)
            into[name] = self.device.upload(np.ascontiguousarray(array_NS)), array_NS.shape
        for name, item_bytes in self._item_bytes.items():
            shape = tuple(self._context.get_tensor_shape(name))
            into[name] = self.device.allocate(int(np.prod(shape)) * item_bytes), shape
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
        return DeviceAnswers(self.decoder, kept, len(ids_NT))


class DeviceAnswers:
    """See `stages.adapters.backends.Begun`; rows of answers are as long as each other.

    Args:
        decoder: its plan.
        kept: what was read of each group of rows.
        rows: N.
    """

    def __init__(self, decoder: CachedPlan, kept: list[Kept], rows: int) -> None:
        self._decoder, self._kept, self._rows, self._length = decoder, kept, rows, 0

    def read(self, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read more tokens, in parts of as many as may be asked at once."""
        parts = []
        for start in range(0, ids_NT.shape[1], self._decoder.most_asked):
            part_NT = ids_NT[:, start : start + self._decoder.most_asked]
            parts.append(np.concatenate([self._read(*one, part_NT) for one in self._groups()]))
            self._length += part_NT.shape[1]
        return np.concatenate(parts, axis=1)

    def _groups(self) -> list[tuple[Kept, slice]]:
        return list(zip(self._kept, self._decoder.groups(self._rows), strict=True))

    def _read(self, kept: Kept, at: slice, ids_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        rows_NT = ids_NT[at]
        asked_NK = np.tile(np.arange(rows_NT.shape[1]), (len(rows_NT), 1))
        return self._decoder.read(kept, rows_NT, np.full(len(rows_NT), self._length), asked_NK)
