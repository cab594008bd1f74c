"""A plan that keeps what it has read: its cache lies in the GPU's memory, where the plan writes into it.

A prompt is read by one profile of the plan, a token of each row by the other. Rows beyond the plan's batch are groups.

Shapes: N sequences, T new tokens, K of them asked, V vocabulary, M places.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.adapters.backends import aligned
from stages.adapters.tensorrt.build import ASKED, DECODE, LENGTHS, PAST, PREFILL
from stages.adapters.tensorrt.device import Device
from stages.runtime.contract import DoesNotFit, StageError

IDS, LOGITS, PRESENT = "input_ids", "logits", "present"
RESERVE_BYTES = 256 << 20
"""Of the GPU's memory, which a cache leaves to the logits and to what the plan computes in between."""

Pointers = Mapping[str, ctypes.c_void_p]
Lying = dict[str, tuple[ctypes.c_void_p, tuple[int, ...]]]
"""What lies on the device and how large it is."""


def infer(
    device: Device, context: Any, inputs: Mapping[str, NDArray[np.int64]], lying: Pointers | None = None
) -> NDArray[np.float32]:
    """The logits of one call.

    Args:
        device: where the plan runs.
        context: of the plan, with its profile chosen.
        inputs: by name; copied to the device.
        lying: names of what lies there already, inputs whose shape is set and outputs.

    Raises:
        StageError: the plan has no kernels for a shape, or fails.
        DoesNotFit: memory ran out.
    """
    held: list[ctypes.c_void_p] = []
    try:
        for name, array in inputs.items():
            set_shape(context, name, array.shape)
            held.append(device.upload(np.ascontiguousarray(array)))
            context.set_tensor_address(name, held[-1].value)
        for name, pointer in (lying or {}).items():
            context.set_tensor_address(name, pointer.value)
        found = np.empty(tuple(context.get_tensor_shape(LOGITS)), dtype=np.float32)
        held.append(device.allocate(found.nbytes))
        context.set_tensor_address(LOGITS, held[-1].value)
        if not context.execute_async_v3(0):
            raise StageError("the engine failed to execute", remedy="See the GPU's log with `nvidia-smi`.")
        device.wait()
        device.download(held[-1], found)
        return found
    finally:
        for pointer in held:
            device.release(pointer)


def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> None:
    """Say how large an input is; raises StageError where the plan has no kernels for it."""
    if not context.set_input_shape(name, shape):
        raise StageError(f"the engine takes no {name} of this shape", measured=shape)


class CachedPlan:
    """A deserialized plan with a cache.

    Args:
        device: the GPU that it was built for.
        engine: TensorRT's.
        alive: what must outlive the engine.
    """

    def __init__(self, device: Device, engine: Any, alive: tuple[Any, ...]) -> None:
        self.device, self._alive = device, (*alive, engine)
        self.names = names_of(engine)
        self.state = {name: PRESENT + name.removeprefix(PAST) for name in self.names if name.startswith(PAST)}
        self.sizes = {name: tuple(engine.get_tensor_shape(name))[1:] for name in self.state}
        self._item_bytes = {name: int(engine.get_tensor_dtype(name).itemsize) for name in self.state}
        self.most_rows, self.most_asked = (int(size) for size in engine.get_tensor_profile_shape(ASKED, PREFILL)[2])
        self.places = int(engine.get_tensor_profile_shape(IDS, PREFILL)[2][1])
        self._contexts = {number: context_of(engine, number) for number in (PREFILL, DECODE)}

    def begin(self, rows: int) -> Kept:
        """Room for some rows.

        Raises:
            DoesNotFit: there is none for them.
        """
        needed, free = sum(self.row_bytes().values()) * rows, self.device.free_bytes()
        if needed + RESERVE_BYTES > free:
            raise DoesNotFit(
                "the GPU has no room for what is to be read",
                measured=f"{rows} texts of {self.places} tokens need {needed / 1e6:.0f} MB",
                limit=f"{max(0, free - RESERVE_BYTES) / 1e6:.0f} MB",
                remedy="Ask fewer texts at once, or compile with a smaller `maximum_tokens`.",
            )
        return Kept(self, rows)

    def row_bytes(self) -> dict[str, int]:
        """What a row of each part of the cache takes."""
        return {name: int(np.prod(size)) * self._item_bytes[name] for name, size in self.sizes.items()}

    def read(
        self, kept: Kept, ids_NT: NDArray[np.int64], lengths_N: NDArray[np.int64], asked_NK: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """logits_NKV of new tokens that stand behind `lengths_N` of each row."""
        if ids_NT.shape[1] + int(lengths_N.max()) > self.places:
            raise StageError(
                "what is read is longer than the cache",
                measured=f"{ids_NT.shape[1] + int(lengths_N.max())} tokens",
                limit=f"{self.places} tokens",
                remedy="Compile with a larger `maximum_tokens`.",
            )
        context = self._contexts[DECODE if ids_NT.shape[1] == 1 else PREFILL]
        beside = {name: one for name, one in kept.beside.items() if name in self.names}
        sizes = {name: (len(ids_NT), *size) for name, size in self.sizes.items()}
        for name, size in (sizes | {name: size for name, (_, size) in beside.items()}).items():
            set_shape(context, name, size)
        # What comes out is what went in: the plan writes new keys and values where they belong.
        lying = kept.pointers | {self.state[name]: pointer for name, pointer in kept.pointers.items()}
        lying |= {name: pointer for name, (pointer, _) in beside.items()}
        return infer(self.device, context, {IDS: ids_NT, LENGTHS: lengths_N, ASKED: asked_NK}, lying)

    def logits(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """logits_NTV of whole sequences; 0 where the mask is."""
        rows_NT, counts_N = aligned(ids_NT, mask_NT)
        mask_NT = np.ones_like(ids_NT) if mask_NT is None else mask_NT
        groups = [self._whole(rows_NT[at]) for at in self.groups(len(rows_NT))]
        found_NTV = np.concatenate(groups)
        logits_NTV = np.zeros((*ids_NT.shape, found_NTV.shape[2]), np.float32)
        for logits_TV, found_TV, mask_T, count in zip(logits_NTV, found_NTV, mask_NT, counts_N, strict=True):
            logits_TV[mask_T > 0] = found_TV[:count]
        return logits_NTV

    def _whole(self, rows_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """In parts of as many tokens as may be asked at once."""
        kept, parts = self.begin(len(rows_NT)), []
        try:
            for start in range(0, rows_NT.shape[1], self.most_asked):
                part_NT = rows_NT[:, start : start + self.most_asked]
                asked_NK = np.tile(np.arange(part_NT.shape[1]), (len(part_NT), 1))
                parts.append(self.read(kept, part_NT, np.full(len(part_NT), start), asked_NK))
        finally:
            kept.close()
        return np.concatenate(parts, axis=1)

    def groups(self, rows: int) -> list[slice]:
        """Rows that are read together."""
        return [slice(start, min(start + self.most_rows, rows)) for start in range(0, rows, self.most_rows)]


class Kept:
    """The cache of some rows, in the GPU's memory until it is closed or forgotten; `beside` goes in at each call."""

    def __init__(self, opened: CachedPlan, rows: int) -> None:
        self.pointers: dict[str, ctypes.c_void_p] = {}
        self.beside: Lying = {}
        self.close = weakref.finalize(self, _release, opened.device, self.pointers, self.beside)
        self.close.atexit = False  # the driver gives everything back then
        try:
            for name, size_bytes in opened.row_bytes().items():
                # Places that nobody has written are masked, and no number times a weight of 0 is still none.
                self.pointers[name] = opened.device.zeros(size_bytes * rows)
        except StageError:
            self.close()
            raise


class DeviceSteps:
    """See `stages.adapters.backends.Steps`.

    Args:
        opened: the plan.
        maximum_tokens: the longest sequence that it reads.
    """

    def __init__(self, opened: CachedPlan, maximum_tokens: int) -> None:
        self._opened, self._most = opened, min(maximum_tokens, opened.places)
        self._kept: list[Kept] = []
        self._lengths_N = np.zeros(0, np.int64)

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read prompts."""
        for kept in self._kept:
            kept.close()
        self._kept = []
        rows_NT, counts_N = aligned(ids_NT, mask_NT)
        found = []
        for at in self._opened.groups(len(rows_NT)):
            counts = counts_N[at]
            self._kept.append(self._opened.begin(len(counts)))
            nothing_N = np.zeros(len(counts), np.int64)
            part_NT = rows_NT[at, : counts.max()]
            found.append(self._opened.read(self._kept[-1], part_NT, nothing_N, counts[:, None] - 1))
        self._lengths_N = counts_N
        return _last(found)

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a token of each row."""
        # A row that has ended may be led on beyond what the model reads; whatever it says is not wanted.
        lengths_N = np.minimum(self._lengths_N, self._most - 1)
        asked_N1 = np.zeros((len(tokens_N), 1), np.int64)
        found = [
            self._opened.read(kept, tokens_N[at, None], lengths_N[at], asked_N1[at])
            for kept, at in zip(self._kept, self._opened.groups(len(tokens_N)), strict=True)
        ]
        self._lengths_N = lengths_N + 1
        return _last(found)

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows, each as often as it is named."""
        before = self._kept
        self._kept, self._lengths_N = reordered(self._opened, before, rows_N), self._lengths_N[rows_N]
        for kept in before:
            kept.close()

    def truncate(self, tokens: int) -> None:
        """See `stages.adapters.backends.Rewinding`; what stands behind a row's end is masked."""
        self._lengths_N = np.minimum(self._lengths_N, tokens)

    def more(self, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `stages.adapters.backends.Rewinding`."""
        (kept,), asked_11 = self._kept, np.array([[len(ids_T) - 1]])
        logits_V: NDArray[np.float32] = self._opened.read(kept, ids_T[None], self._lengths_N, asked_11)[0, 0]
        self._lengths_N = self._lengths_N + len(ids_T)
        return logits_V


def reordered(opened: CachedPlan, before: Sequence[Kept], rows_N: NDArray[np.int64]) -> list[Kept]:
    """The cache of these rows, each as often as it is named; what goes in beside it is not there yet."""
    made = list[Kept]()
    for at in opened.groups(len(rows_N)):
        made.append(opened.begin(len(rows_N[at])))
        for name, size_bytes in opened.row_bytes().items():
            for place, row in enumerate(rows_N[at].tolist()):
                source = before[row // opened.most_rows].pointers[name]
                to, by = made[-1].pointers[name], size_bytes
                opened.device.copy(behind(to, place * by), behind(source, row % opened.most_rows * by), by)
    return made


def behind(pointer: ctypes.c_void_p, size_bytes: int) -> ctypes.c_void_p:
    """A place on the device so many bytes behind another."""
    return ctypes.c_void_p((pointer.value or 0) + size_bytes)


def _last(found: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    logits_NV: NDArray[np.float32] = np.concatenate([one[:, 0] for one in found])
    return logits_NV


def _release(device: Device, pointers: dict[str, ctypes.c_void_p], beside: Lying) -> None:
    for pointer in (*pointers.values(), *(one for one, _ in beside.values())):
        device.release(pointer)
    pointers.clear()
    beside.clear()


def names_of(engine: Any) -> list[str]:
    """What a plan takes and gives."""
    return [str(engine.get_tensor_name(number)) for number in range(engine.num_io_tensors)]


def context_of(engine: Any, profile: int) -> Any:
    """What executes a plan by one of its profiles; raises StageError where it has none of this number."""
    context = engine.create_execution_context()
    if not context.set_optimization_profile_async(profile, 0):
        raise StageError(
            "the engine lacks a profile",
            measured=f"number {profile}",
            remedy="Compile it anew: it was built by another version.",
        )
    return context
