"""One artifact in a process of its own, which loads nothing else: python -m stages.bench.child FOLDER DEVICE.

It says what it opened, then answers each line on standard input, batches of prompts, by a line of times. It ends where
its standard input does, so that none outlives who asks.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.contract import DoesNotFit, StageError
from stages.runtime.peak_memory import peak_rss_bytes

if TYPE_CHECKING:
    from stages.serving.engine import Answerer

WRITES = ("generate", "translate")
"""Tasks of models that write one token after the other."""


def timed(model: Answerer, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """How long a batch took.

    Returns:
        `first_s`, until the whole batch had its first token or its answer; `steps_s`, each further token of all rows;
        `kept_bytes`, what a model that keeps what it reads has kept at the end, None where that is not known.
    """
    from stages.serving.generate import likeliest, padded, written

    began = time.perf_counter()
    if model.task not in WRITES:
        model.forward(*padded(prompts))
        return {"first_s": time.perf_counter() - began, "steps_s": [], "kept_bytes": None}
    follow = model.forward if model.steps is None else model.steps()
    new, came = [list[int]() for _ in prompts], list[float]()
    for number in written(follow, prompts, new, lambda row: len(new[row]) < new_tokens, likeliest):
        if number == len(prompts) - 1:  # rows are told in their order: the batch has its token
            came.append(time.perf_counter())
    steps = [later - earlier for earlier, later in pairwise(came)]
    return {"first_s": came[0] - began, "steps_s": steps, "kept_bytes": getattr(follow, "kept_bytes", None)}


def main() -> int:
    """Open the folder and answer."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print at will
    warnings.filterwarnings("ignore")
    try:
        model, load_s = _opened(Path(sys.argv[1]), sys.argv[2])
        about = {"target": model.target, "task": model.task, "maximum_tokens": model.maximum_tokens}
        _say(out, {**about, "load_s": load_s, "threads": _threads()})
        for line in sys.stdin:
            asked = json.loads(line)
            found = timed(model, asked["prompts"], asked["new_tokens"])
            _say(out, {**found, "peak_rss_bytes": peak_rss_bytes()})
    except StageError as error:
        measured, limit = (None if one is None else str(one) for one in (error.measured, error.limit))
        said = {"what": error.what, "measured": measured, "limit": limit, "remedy": error.remedy}
        _say(out, {"refused": said, "does_not_fit": isinstance(error, DoesNotFit)})
        return 1
    return 0


def _opened(folder: Path, device: str) -> tuple[Answerer, float]:
    """The model, and the seconds that it took to be ready, with what executes it."""
    from stages.serving.engine import open_engine

    began = time.perf_counter()
    # The stage's inputs were hashed against their manifests.
    model = open_engine(folder, verified=True, device=device)
    return model, time.perf_counter() - began


def _threads() -> int:
    if torch := sys.modules.get("torch"):
        return int(torch.get_num_threads())
    from stages.adapters.onnxruntime import threads

    return threads()


def _say(out: Any, said: dict[str, Any]) -> None:
    out.write(json.dumps(said) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
