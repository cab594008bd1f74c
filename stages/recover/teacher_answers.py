"""What the teacher says of each window: asked once, kept on disk, read from there in every later epoch.

Shapes: N windows, T tokens, H hidden, k likeliest tokens.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stages.algorithms.distillation import Targets, likeliest
from stages.recover.headless import Apart
from stages.recover.matched_blocks import inputs_of
from stages.runtime.contract import StageError


@dataclass(frozen=True)
class Lesson:
    """The teacher's answers on some windows: targets of all their positions, and what its listened-to blocks read."""

    targets: Targets
    states: Sequence[Tensor]


class Lessons:
    """The teacher's answers on every window, each computed when it is first asked for.

    The files are mapped. A window counts as kept where its checksum stands, so that one that was half written when the
    process died is computed again; computed alone, it comes out the same in every run.

    Attributes:
        teacher: whose answers they are.
        ids_NT: the windows.
        listened: the teacher's blocks whose inputs are kept, by name.
    """

    def __init__(
        self,
        teacher: Apart,
        ids_NT: Tensor,
        folder: Path,
        *,
        tokens_kept: int,
        temperature: float,
        listened: Mapping[str, nn.Module],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher, self.ids_NT, self.listened = teacher, ids_NT, listened
        self._k, self._temperature = min(tokens_kept, len(teacher.head.weight_VH)), temperature
        count, length = len(ids_NT), teacher.length(ids_NT)
        width = teacher.model.config.get_text_config().hidden_size
        self._tokens = _mapped(folder / "tokens", np.int32, (count, length, self._k))
        self._log_p = _mapped(folder / "log_p", np.float32, (count, length, self._k))
        tokens = teacher.counted_tokens(ids_NT[:1]).shape[1]
        self._states = [_mapped(folder / f"state-{n}", np.int16, (count, tokens, width)) for n in range(len(listened))]
        self._sums = _mapped(folder / "checksums", np.uint32, (count,))
        _reserve(self._sums, 0, count)

    def of(self, chosen: Sequence[int]) -> Lesson:
        """The answers on the chosen windows.

        Raises:
            StageError: the teacher's answer holds a NaN.
        """
        for n in chosen:
            if self._sums[n] == 0 or self._sums[n] != self._checksum(n):
                self._ask(n)
        rows = list(chosen)
        targets = Targets(
            torch.from_numpy(self._tokens[rows]).flatten(0, 1), torch.from_numpy(self._log_p[rows]).flatten(0, 1)
        )
        return Lesson(targets, [torch.from_numpy(kept[rows]).view(torch.bfloat16) for kept in self._states])

    @torch.no_grad()
    def _ask(self, n: int) -> None:
        with inputs_of(self.listened) as heard:
            hidden_TH = self.teacher.hidden(self.ids_NT[n : n + 1])[0]
        self.keep(n, hidden_TH, {name: state_1TH[0] for name, state_1TH in heard.items()})

    @torch.no_grad()
    def keep(self, n: int, hidden_TH: Tensor, heard: Mapping[str, Tensor]) -> None:
        """Keep the answers on a window, from the teacher's last hidden states and what its blocks read.

        Raises:
            StageError: they hold a NaN.
            OSError: the disk is full.
        """
        targets = likeliest(self.teacher.head, hidden_TH, self._k, self._temperature)
        if not targets.log_p_Nk.isfinite().all():
            raise StageError(f"the teacher's answer on window {n} of the train split holds a NaN or an infinity")
        for kept in (self._tokens, self._log_p, *self._states):
            _reserve(kept, n, 1)
        self._tokens[n], self._log_p[n] = targets.tokens_Nk.numpy(), targets.log_p_Nk.numpy()
        for kept, name in zip(self._states, self.listened, strict=True):
            kept[n] = heard[name].bfloat16().view(torch.int16).numpy()
        self._sums[n] = self._checksum(n)

    def _checksum(self, n: int) -> int:
        found = 0
        for kept in (self._tokens, self._log_p, *self._states):
            found = zlib.crc32(kept[n], found)
        return found or 1


def _mapped(
    path: Path, dtype: type[np.generic], shape: tuple[int, ...]
) -> np.memmap[tuple[int, ...], np.dtype[np.generic]]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size != size:
        with path.open("wb") as stream:
            stream.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


def _reserve(kept: np.memmap[tuple[int, ...], np.dtype[np.generic]], first: int, count: int) -> None:
    """Make room on the disk for entries: a mapped page that finds none would end the process without a word."""
    with Path(str(kept.filename)).open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), first * kept.strides[0], count * kept.strides[0])
