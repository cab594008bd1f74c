"""Graphs on the CPU by ONNX Runtime. The only module that imports it.

Shapes: N sequences, T tokens, K of them asked, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as vendor

from stages.adapters.backends import TYPES, aligned
from stages.runtime.contract import DoesNotFit, StageError

VENDOR_ERRORS = (
    vendor.EPFail, vendor.Fail, vendor.InvalidArgument, vendor.InvalidGraph, vendor.InvalidProtobuf, vendor.NoSuchFile,
    vendor.NotImplemented, vendor.RuntimeException,
)  # fmt: skip
PAST, PRESENT = "past_key_values", "present"
"""What the names of a cache begin with, as inputs and as outputs."""
ROOM = 64
"""Places for tokens to come that a cache begins with; it doubles when they are taken."""
_PROCESSOR = Path("/proc/cpuinfo")
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Session:
    """A loaded graph with inputs `input_ids` and `attention_mask`, maybe `token_type_ids`, and an output `logits`."""

    session: Any

    @property
    def tells_segments(self) -> bool:
        """Whether it takes the segments of tokens."""
        return any(one.name == TYPES for one in self.session.get_inputs())

    def logits(self, ids_NT: Ints, mask_NT: Ints | None = None, type_NT: Ints | None = None) -> NDArray[np.float32]:
        """logits_NTV; without a mask every token counts, without segments all are of the first.

        Raises:
            StageError: the runtime refuses, with its own text.
            DoesNotFit: memory ran out.
        """
        return self.outputs(ids_NT, mask_NT, type_NT, ("logits",))["logits"]

    def outputs(
        self,
        ids_NT: Ints,
        mask_NT: Ints | None = None,
        type_NT: Ints | None = None,
        names: Sequence[str] = (),
    ) -> dict[str, NDArray[np.float32]]:
        """Every output of the graph by its name, or those that are named; errors as of `logits`."""
        names = [*names] or [output.name for output in self.session.get_outputs()]
        feeds = {"input_ids": ids_NT, "attention_mask": np.ones_like(ids_NT) if mask_NT is None else mask_NT}
        if self.tells_segments:
            feeds[TYPES] = np.zeros_like(ids_NT) if type_NT is None else type_NT
        return dict(zip(names, _ran(lambda: self.session.run(names, feeds)), strict=True))


WRONG = ["ReluQuantRewrite"]
"""Of ONNX Runtime 1.31: it leaves a Relu out before any rounding whose zero is 0; that of FP8 takes negative values."""
KEPT_AS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
"""Types of a graph's cache -> numpy's."""


@dataclass(frozen=True)
class CachedSession:
    """A loaded graph that keeps what it has read: see `stages.export.cached`.

    Attributes:
        session: ONNX Runtime's.
        state: input -> output that takes its place at the next call.
    """

    session: Any
    state: dict[str, str]

    def logits(self, ids_NT: Ints, mask_NT: Ints | None = None) -> NDArray[np.float32]:
        """logits_NTV of whole windows; 0 where the mask is. Errors as of `Session.logits`."""
        rows, counts_N = aligned(ids_NT, mask_NT)
        found_NTV = self.begin(len(rows), rows.shape[1]).read(rows)
        if mask_NT is None or (counts_N == ids_NT.shape[1]).all():
            return found_NTV
        logits_NTV = np.zeros((*ids_NT.shape, found_NTV.shape[2]), np.float32)
        for logits_TV, found_TV, mask_T, count in zip(logits_NTV, found_NTV, mask_NT, counts_N, strict=True):
            logits_TV[mask_T > 0] = found_TV[:count]
        return logits_NTV

    def outputs(self, ids_NT: NDArray[np.int64], kept: Kept | None = None) -> dict[str, NDArray[np.float32]]:
        """Every output of the graph but the cache, by its name; an empty one unless given. Errors as of `logits`."""
        names = [one.name for one in self.session.get_outputs() if one.name not in self.state.values()]
        kept = kept or self.begin(*ids_NT.shape)
        feeds = kept.feeds(ids_NT, np.tile(np.arange(ids_NT.shape[1]), (len(ids_NT), 1)))
        return dict(zip(names, _ran(lambda: self.session.run(names, feeds | kept.places)), strict=True))

    def begin(self, rows: int, places: int) -> Kept:
        """An empty cache.

        Args:
            rows: N.
            places: tokens that each row has room for; room for more is made as they come.
        """
        return Kept(self, rows, places)


class Kept:
    """What was read of some rows, in buffers that the graph writes into; `beside`, of texts, goes in at each call."""

    def __init__(self, opened: CachedSession, rows: int, places: int) -> None:
        self.opened, self.beside = opened, dict[str, NDArray[Any]]()
        past = [one for one in opened.session.get_inputs() if one.name in opened.state]
        with room_for(rows, places):
            self.lengths_N, self.texts_N = np.zeros(rows, np.int64), np.arange(rows)
            self.places = {
                one.name: np.zeros((rows, one.shape[1], places, one.shape[3]), KEPT_AS[one.type]) for one in past
            }

    def feeds(self, ids_NT: NDArray[np.int64], asked_NK: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What goes in beside the cache."""
        return {"input_ids": ids_NT, "past_lengths": self.lengths_N, "logits_at": asked_NK, **self.beside}

    def read(self, ids_NT: Ints, counts_N: Ints | None = None, asked_NK: Ints | None = None) -> NDArray[np.float32]:
        """logits_NKV of new tokens, which stand behind those read before.

        Args:
            ids_NT: right-padded.
            counts_N: how many of each row count; all unless given.
            asked_NK: of which of them; all unless given.

        Raises:
            StageError: the runtime refuses, with its own text.
            DoesNotFit: memory ran out.
        """
        rows, tokens = ids_NT.shape
        self._make_room(int(self.lengths_N.max()) + tokens)
        asked_NK = np.tile(np.arange(tokens), (rows, 1)) if asked_NK is None else asked_NK
        binding = self.opened.session.io_binding()
        binding.bind_output("logits", "cpu")  # first, as `get_outputs` has them in this order
        for name, array in self.feeds(np.ascontiguousarray(ids_NT), np.ascontiguousarray(asked_NK)).items():
            binding.bind_cpu_input(name, array)
        for name, array in self.places.items():
            at = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
            binding.bind_input(name, *at)
            binding.bind_output(self.opened.state[name], *at)
        _ran(lambda: self.opened.session.run_with_iobinding(binding))
        self.lengths_N = self.lengths_N + (tokens if counts_N is None else counts_N)
        found: NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return found

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """Go on with these rows, each as often as it is named."""
        most = int(self.lengths_N.max(initial=0))
        places = next(iter(self.places.values())).shape[2]
        with room_for(len(rows_N), places):
            # What stands behind the longest row is nobody's.
            made = {name: np.zeros((len(rows_N), *array.shape[1:]), array.dtype) for name, array in self.places.items()}
            for name, array in self.places.items():
                made[name][:, :, :most] = array[rows_N, :, :most]
            if not np.array_equal(self.texts_N[rows_N], self.texts_N):
                self.beside = {name: array[rows_N] for name, array in self.beside.items()}
        self.places, self.lengths_N, self.texts_N = made, self.lengths_N[rows_N], self.texts_N[rows_N]

    def _make_room(self, wanted: int) -> None:
        places = next(iter(self.places.values())).shape[2]
        if wanted <= places:
            return
        # Twice as much each time, so that a token costs no copy of all before it.
        more = [(0, 0), (0, 0), (0, max(wanted, 2 * places) - places), (0, 0)]
        with room_for(len(self.lengths_N), max(wanted, 2 * places)):
            self.places = {name: np.pad(array, more) for name, array in self.places.items()}


@contextmanager
def room_for(rows: int, places: int) -> Iterator[None]:
    """Within it a cache is made or grows; what does not fit is told, and the cache stays as it was."""
    try:
        yield
    except MemoryError as error:
        raise DoesNotFit(
            "memory ran out for what was read",
            measured=f"{rows} texts of {places} tokens: {error}",
            remedy="Ask fewer or shorter texts at once, or take a larger machine.",
        ) from error


def open_session(path: Path, *, literal: bool = False) -> Session | CachedSession:
    """Load a graph, with a cache or without.

    Fusion of Q/DQ pairs is off: it would round activations that the graph leaves in float. Dequantized constants are
    folded instead, so that weights behind a DequantizeLinear cost no time per call.

    Args:
        path: model.onnx; external data beside it.
        literal: compute node by node, as the reference of a rewritten graph.

    Raises:
        StageError: the runtime refuses the graph, with its own text.
        DoesNotFit: memory ran out.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if literal else levels.ORT_ENABLE_ALL
    for key, value in {
        "session.disable_quant_qdq": "1",
        "session.qdq_matmulnbits_accuracy_level": "1",
        "session.x64quantprecision": "0" if has_exact_kernels() else "1",
        # A step of a decoder is hundreds of products of microseconds, for which no thread can be woken each time: it
        # took 14 ms instead of 10. Between two runs no thread takes the cores that other work waits for.
        "session.intra_op.allow_spinning": "0" if literal else "1",
        "session.force_spinning_stop": "1",
    }.items():
        options.add_session_config_entry(key, value)
    try:
        how = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": WRONG}
        session = onnxruntime.InferenceSession(str(path), options, **how)
    except VENDOR_ERRORS as error:
        raise _told(error, "load") from error
    _give_back()
    past = [one.name for one in session.get_inputs() if one.name.startswith(PAST)]
    if not past:
        return Session(session)
    return CachedSession(session, {name: PRESENT + name.removeprefix(PAST) for name in past})


def _give_back() -> None:
    """Return to the system what loading took and left: of an engine of 125 MB 302 MB stayed, and 215 do so."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's; others keep nothing
        trim(0)


def _ran(call: Callable[[], Any]) -> Any:
    try:
        return call()
    # What runs with buffers of its own raises no type of the vendor's.
    except (*VENDOR_ERRORS, RuntimeError) as error:
        raise _told(error, "run") from error


def threads() -> int:
    """$OMP_NUM_THREADS, which the runtime's own pool does not read, or the processors this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_exact_kernels(processor: Path = _PROCESSOR) -> bool:
    """Whether products of UINT8 and INT8 are exact here.

    x86 without VNNI adds two products in 16 bits, which saturates. Where that cannot be ruled out, the runtime is told
    to make the weights unsigned, which is exact and takes 2.5 times as long.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return True
    return processor.is_file() and "vnni" in processor.read_text(encoding="utf-8")


def _told(error: Exception, verb: str) -> StageError:
    text = str(error).removeprefix("[ONNXRuntimeError] : ").strip()
    kind = DoesNotFit if "Failed to allocate memory" in text or "bad_alloc" in text else StageError
    remedy = "Use fewer or shorter windows, or a larger machine." if kind is DoesNotFit else "Export the graph again."
    if isinstance(error, vendor.NotImplemented):
        remedy = "Take `export` and what follows it out of the recipe, and judge the checkpoint itself."
    limit = f"what ONNX Runtime {onnxruntime.__version__} takes"
    return kind(f"ONNX Runtime could not {verb} the graph", measured=text, limit=limit, remedy=remedy)
