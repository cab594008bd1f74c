"""A model that lives in another tool's process, asked from ours: that tool wants libraries that ours cannot use.

Each question is a word on its standard input with arrays in a file beside, each answer an event and a file. The half
that answers needs torch and numpy alone.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from stages.runtime.contract import StageError
from stages.runtime.fingerprint import ROOT
from stages.runtime.progress import JsonLines

if TYPE_CHECKING:
    from stages.adapters.backends import Steps

GIVEN, ANSWER = "given.npz", "answer.npy"
_MEMORY = Path("/dev/shm")
"""Where files are memory: a hundred megabytes of logits come and go with each question."""


class Answering:
    """What a model in memory says: to whole sequences, or to one token more of those that it has read."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.mask_NT, self.kept = torch.empty(0), None

    def __call__(self, asked: str, given: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """logits_NTV for `forward`, logits_NV for `begin` and `next`, nothing for `reorder`."""
        if asked == "reorder":
            rows_N = torch.from_numpy(given["rows"])
            self.mask_NT = self.mask_NT.index_select(0, rows_N)
            self.kept.reorder_cache(rows_N)
            return np.empty(0, dtype=np.float32)
        ids_NT = torch.from_numpy(given["ids"])
        if asked == "next":
            self.mask_NT = torch.cat([self.mask_NT, torch.ones_like(ids_NT)], dim=1)
        else:
            self.mask_NT, self.kept = torch.from_numpy(given["mask"]), None
        places_NT = (self.mask_NT.cumsum(-1) - 1).clamp(min=0)[:, -ids_NT.shape[1] :]
        known: dict[str, Any] = {"input_ids": ids_NT, "attention_mask": self.mask_NT, "position_ids": places_NT}
        with torch.no_grad():
            if asked == "forward":
                logits_NTV: NDArray[np.float32] = self.model(**known, use_cache=False).logits.float().numpy()
                return logits_NTV
            out = self.model(**known, past_key_values=self.kept, use_cache=True)
        self.kept = out.past_key_values
        logits_NV: NDArray[np.float32] = out.logits[:, -1].float().numpy()
        return logits_NV


def serve(model: Any, folder: Path, questions: TextIO, tell: JsonLines) -> None:
    """Answer until nobody asks any more."""
    answering = Answering(model)
    for line in questions:
        with np.load(folder / GIVEN) as given:
            found = answering(line.strip(), given)
        np.save(folder / ANSWER, found)
        tell.send(event="answered")


class Lent:
    """Our side: a model that another process holds, as `forward` and `steps` of an Answerer."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def forward(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `stages.serving.engine.Answerer`."""
        return self._ask("forward", ids=ids_NT, mask=mask_NT)

    def steps(self) -> Steps:
        """See `stages.serving.engine.Answerer`; what was read before is forgotten when another begins."""
        return self

    def begin(self, ids_NT: NDArray[np.int64], mask_NT: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `stages.serving.generate.Steps`."""
        return self._ask("begin", ids=ids_NT, mask=mask_NT)

    def next(self, tokens_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `stages.serving.generate.Steps`."""
        return self._ask("next", ids=tokens_N[:, None])

    def reorder(self, rows_N: NDArray[np.int64]) -> None:
        """See `stages.serving.generate.Steps`."""
        self._ask("reorder", rows=rows_N)

    def heard(self) -> dict[str, Any]:
        """Its next event.

        Raises:
            StageError: it refused, or ended.
        """
        assert self._process.stdout is not None
        event: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        if not event or event.get("event") == "failed":
            raise StageError(event.get("said", "the tool's process ended; its last words stand above"))
        return event

    def _ask(self, asked: str, **given: NDArray[np.int64]) -> NDArray[np.float32]:
        np.savez(self._folder / GIVEN, **given)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{asked}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise StageError("the tool's process ended; its last words stand above") from error
        while self.heard()["event"] != "answered":
            pass
        found: NDArray[np.float32] = np.load(self._folder / ANSWER)
        return found


@contextmanager
def borrowed(task: Mapping[str, Any], python: str) -> Iterator[tuple[Lent, dict[str, Any]]]:
    """A child of another interpreter that does a task and then serves its model; also what it said of itself."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps({**task, "folder": name}), encoding="utf-8")
        command = [python, "-m", "tests.benchmarks.child", str(folder / "task.json")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, cwd=ROOT
        ) as process:
            try:
                lent = Lent(process, folder)
                while (event := lent.heard())["event"] != "ready":
                    pass
                yield lent, event
            finally:
                process.kill()
