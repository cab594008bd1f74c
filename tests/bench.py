"""`make bench-engine`: the engine of the last main job beside the dense model, as ratios measured in turn in one run.

Each figure comes from a child of its own, A B C A B C, so that a machine whose speed drifts slows all of them. The
artifacts are those of the newest run in the store that passed; `make run` makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

NEW_TOKENS = 64
ROUNDS_OF_PROMPTS = 3


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """Load, prompt and tokens of one engine, in this process."""
    import numpy as np

    from stages.runtime.execute import peak_rss_bytes
    from stages.serving.engine import open_engine

    began = time.perf_counter()
    engine = open_engine(folder, verified=True)
    load = time.perf_counter() - began
    assert engine.steps is not None
    ids_1T = np.arange(tokens, dtype=np.int64)[None] + 1000
    prompts, steps = list[float](), list[float]()
    for turn in range(ROUNDS_OF_PROMPTS):
        writing, began = engine.steps(), time.perf_counter()
        logits_1V = writing.begin(ids_1T, np.ones_like(ids_1T))
        prompts.append(time.perf_counter() - began)
        for _ in range(NEW_TOKENS if turn else 1):  # the first round warms up
            began = time.perf_counter()
            logits_1V = writing.next(logits_1V.argmax(-1))
            steps.append(time.perf_counter() - began)
    steps = steps[1:]
    return {
        "load_s": load,
        "prompt_ms": 1000 * statistics.median(prompts[1:]),
        "token_ms": 1000 * statistics.median(steps),
        "token_p95_ms": 1000 * float(np.quantile(steps, 0.95)),
        "peak_rss_bytes": float(peak_rss_bytes()),
    }


def newest(store_uri: str) -> dict[str, Path]:
    """Folders to compare, by a name for the table. The dense model's engine is made where the store has none."""
    from flows.running.run_records import records
    from stages import stage
    from stages.adapters.connect import connect
    from stages.runtime.execute import execute, work_of
    from stages.runtime.progress import Silent

    store = connect(store_uri)
    passed = [record for record in records(store.scratch) if record.result and record.result.passed]
    if not passed:
        sys.exit(f"error: no run in {store.uri} has passed; `make run` makes one")
    steps = {step.name: step for step in passed[-1].result.steps}
    dense = made = steps["dense"].fingerprint
    for name, params, role in (("export", {}, "model"), ("compile", {"backend": "onnxruntime"}, "graph")):
        definition = stage(name)
        given = definition.params.model_validate(params)
        work = work_of(definition, given, {role: made})
        made = execute(definition, given, work, store, Silent(), step=f"dense-{name}").identity
    wanted = {"dense, torch fp32": dense, "dense, ONNX Runtime fp32": made}
    wanted["engine, ONNX Runtime"] = steps["cpu"].fingerprint
    return {name: store.checkout(identity) for name, identity in wanted.items()}


def main() -> None:
    """Measure in turn and print medians and ratios to the first row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default=os.environ.get("ENGINERY_STORE") or str(Path.home() / ".enginery" / "store"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", type=Path)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked.only, asked.tokens)))  # noqa: T201
        return
    folders = newest(asked.store)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _ in range(asked.rounds):
        for name, folder in folders.items():
            command = [sys.executable, "-m", "tests.bench", "--only", str(folder), "--tokens", str(asked.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures[name].append(json.loads(done.stdout.splitlines()[-1]))
    first = next(iter(figures.values()))
    columns = {
        "load_s": ("load s", 1.0),
        "prompt_ms": ("prompt ms", 1.0),
        "token_ms": ("token ms", 1.0),
        "token_p95_ms": ("p95 ms", 1.0),
        "peak_rss_bytes": ("RSS GB", 1e-9),
    }
    print(f"{'':26}" + "".join(f"{title:>11}{'ratio':>7}" for title, _ in columns.values()))  # noqa: T201
    for name, rounds in figures.items():
        cells = ""
        for key, (_, scale) in columns.items():
            value = statistics.median(one[key] for one in rounds) * scale
            ratio = statistics.median(a[key] / b[key] for a, b in zip(rounds, first, strict=True))
            cells += f"{value:>11.2f}{ratio:>7.2f}"
        print(f"{name:26}{cells}")  # noqa: T201
    said = f"a prompt of {asked.tokens} tokens, {NEW_TOKENS} new ones behind it; medians of {asked.rounds} rounds"
    print(f"{said}, a process each, in turn; ratios to the first row of the same round")  # noqa: T201


if __name__ == "__main__":
    main()
