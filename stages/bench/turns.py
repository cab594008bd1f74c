"""Artifacts in processes of their own, which take turns, so that whatever else the machine does slows both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from stages.bench import child
from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.fingerprint import ROOT


class Contestant:
    """One artifact in its process.

    Attributes:
        about: what it said when it was open: `target`, `task`, `maximum_tokens`, `load_s`, `threads`.
    """

    def __init__(self, role: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._role, self._process, self._errors = role, process, errors
        self.about = self._heard()

    def asked(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """The times of a batch, see `stages.bench.child.timed`, and `peak_rss_bytes`, the most so far.

        Raises:
            StageError: it refused, or its process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said at its end is read below
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no word"])[-1]
            raise StageError(
                f"the process of the {self._role} ended before it had answered",
                measured=f"exit code {code}: {last[:300]}",
                remedy="Where it was killed, memory may have run out: use shorter prompts or smaller batches.",
            )
        found: dict[str, Any] = json.loads(line)
        if refused := found.get("refused"):
            kind = DoesNotFit if found["does_not_fit"] else StageError
            raise kind(f"the {self._role}: {refused.pop('what')}", **refused)
        return found


@contextmanager
def contestant(role: str, folder: Path, device: str) -> Iterator[Contestant]:
    """Open an artifact in a process of its own, which ends with the block.

    Args:
        role: how errors call it.
        folder: of the artifact.
        device: where a checkpoint is executed, `cpu` or `cuda`.

    Raises:
        StageError: it cannot be opened.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", child.__name__, str(folder), device]
    environment = {**os.environ, "PYTHONPATH": path}
    with (
        TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            yield Contestant(role, process, errors)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # what it was not told any more
                if process.stdin is not None:
                    process.stdin.close()
