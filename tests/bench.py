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

PROMPT = "The capital of France is a city whose name every traveller knows, and"
NEW_TOKENS = 32


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """Prefill and generation of one engine, in this process."""
    import numpy as np

    from stages.runtime.execute import peak_rss_bytes
    from stages.serving.engine import open_engine

    engine = open_engine(folder, verified=True)
    ids = np.arange(tokens, dtype=np.int64)[None] + 1000
    engine.logits(ids)
    prefill = []
    for _ in range(3):
        began = time.perf_counter()
        engine.logits(ids)
        prefill.append(time.perf_counter() - began)
    began = time.perf_counter()
    engine.generate([PROMPT], max_new_tokens=NEW_TOKENS)
    generation = time.perf_counter() - began
    return {
        "prefill_ms": 1000 * statistics.median(prefill),
        "generation_tokens_per_s": NEW_TOKENS / generation,
        "peak_rss_bytes": float(peak_rss_bytes()),
    }


def newest(store_uri: str) -> dict[str, Path]:
    """Folders to compare, by a name for the table. The dense model's graph is made where the store has none."""
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
    dense, export = steps["dense"].fingerprint, stage("export")
    params = export.params()
    graph = execute(export, params, work_of(export, params, {"model": dense}), store, Silent(), step="dense-graph")
    wanted = {"dense, torch fp32": dense, "dense, ONNX Runtime fp32": graph.identity}
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
    print(f"{'':28}{'prefill ms':>12}{'ratio':>8}{'tokens/s':>10}{'ratio':>8}{'RSS GB':>8}{'ratio':>8}")  # noqa: T201
    for name, rounds in figures.items():
        cells = []
        for key, scale in (("prefill_ms", 1.0), ("generation_tokens_per_s", 1.0), ("peak_rss_bytes", 1e-9)):
            value = statistics.median(one[key] for one in rounds) * scale
            ratio = statistics.median(a[key] / b[key] for a, b in zip(rounds, first, strict=True))
            cells += [f"{value:.2f}", f"{ratio:.2f}"]
        widths = (12, 8, 10, 8, 8, 8)
        print(f"{name:28}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))  # noqa: T201
    print(f"{asked.tokens} tokens of prompt with all logits; {NEW_TOKENS} new tokens; medians of {asked.rounds} rounds")  # noqa: T201


if __name__ == "__main__":
    main()
