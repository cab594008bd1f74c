"""Memory of weights that are views of a mapped file: pages that were read can be given back and are read again.

safetensors maps a file privately: a page that is written to becomes the process's own, every other page is the file's.
The kernel says of each page which it is, so that giving back can never lose a modification.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor, nn

_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT, _SWAPPED, _OF_A_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_PIECE = 1 << 23
"""Elements at once: a table of tokens may be a third of a large model."""


def forget(tensor: Tensor) -> int:
    """Give back the tensor's pages that a file holds unchanged; reading the tensor brings them again.

    Of a tensor that is not contiguous they are those of its whole storage. No other thread may be writing to it. Where
    the kernel does not say whose a page is (it is Linux's /proc/self/pagemap that does), nothing is given back.

    Returns:
        Bytes given back; 0 for a tensor that no file holds.
    """
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return 0
    whole, page = tensor.untyped_storage(), mmap.PAGESIZE
    begins, size = (tensor.data_ptr(), tensor.nbytes) if tensor.is_contiguous() else (whole.data_ptr(), whole.nbytes())
    first, last = begins // page, -(-(begins + size) // page)
    clean = _unchanged(first, last - first)
    edges = np.flatnonzero(np.diff(clean.astype(np.int8), prepend=0, append=0))
    given = 0
    for start, stop in edges.reshape(-1, 2).tolist():
        address, length = (first + start) * page, (stop - start) * page
        if _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_DONTNEED) == 0:
            given += length
    return given


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Some rows after the others, each piece's pages given back when the next one is asked for; see `forget`."""
    rows = _PIECE * len(tensor) // max(1, tensor.numel()) if tensor.dim() else 0
    for part in tensor.split(max(1, rows)) if tensor.dim() else (tensor,):
        yield part
        forget(part)


def own(tensor: Tensor) -> None:
    """Give a tensor that will be written to memory of its own, wherever it stands; what it was is given back.

    A page of a mapped file that is written to stays in memory as long as any tensor of that file is in use.
    """
    old = tensor.detach()
    tensor.data = old.clone()
    forget(old)


def release(module: nn.Module) -> int:
    """Give back the unchanged pages of every parameter and buffer of a module; see `forget`. Returns the bytes."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(forget(tensor) for tensor in tensors.values())


def trim() -> None:
    """Give back what the C library keeps of freed memory: of many tensors of like sizes it keeps a good deal."""
    if give := getattr(_libc(), "malloc_trim", None):
        give(0)


def _unchanged(first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Of `count` pages from number `first`: which are in memory, belong to a file and were never written to."""
    try:
        with _PAGEMAP.open("rb", buffering=0) as stream:
            stream.seek(8 * first)
            entries = np.frombuffer(stream.read(8 * count), dtype=np.uint64)
    except (FileNotFoundError, PermissionError):
        entries = np.zeros(0, dtype=np.uint64)
    return (entries & (_PRESENT | _SWAPPED | _OF_A_FILE)) == (_PRESENT | _OF_A_FILE)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
