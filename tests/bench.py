"""`make bench-engine`: the engines of the last main job and the dense model's, each beside the dense model, by `bench`.

The artifacts are those of the newest run in the store that passed; `make run` makes them. What was measured on this
machine is found again unless `--again` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from flows.running.run_records import records
from stages import stage
from stages.adapters.connect import connect
from stages.measures.table import SPEED, SPEEDS
from stages.runtime.artifacts import Store
from stages.runtime.execute import execute, work_of
from stages.runtime.progress import Silent


def made(store: Store, name: str, params: dict[str, Any], again: bool = False, **inputs: str) -> str:
    """The fingerprint of a stage's artifact, which is made where the store has none."""
    definition = stage(name)
    given = definition.params.model_validate(params)
    work = work_of(definition, given, inputs)
    return execute(definition, given, work, store, Silent(), step=f"bench-{name}", force=again).identity


def main() -> None:
    """Print figures and their ratios to the dense model's."""
    parser = argparse.ArgumentParser(prog="make bench-engine", description=__doc__)
    parser.add_argument("--store", default=os.environ.get("ENGINERY_STORE") or str(Path.home() / ".enginery" / "store"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--params", default="{}", help="of the stage bench, as JSON")
    asked = parser.parse_args()
    store = connect(asked.store)
    passed = [record for record in records(store.scratch) if record.result and record.result.passed]
    if not passed:
        sys.exit(f"error: no run in {store.uri} has passed; `make run` makes one")
    steps = {step.name: step.fingerprint for step in passed[-1].result.steps}
    graph = made(store, "export", {}, model=steps["dense"])
    engines = {"dense": made(store, "compile", {"backend": "onnxruntime"}, graph=graph), "cpu": steps["cpu"]}
    for name, engine in engines.items():
        params = {**json.loads(asked.params), "target": "onnxruntime:cpu"}
        inputs = {"artifact": engine, "baseline": steps["dense"], "text": steps["text"]}
        report = json.loads(
            (store.checkout(made(store, "bench", params, asked.again, **inputs)) / "report.json").read_text()
        )
        said = report[SPEED]
        print(f"{name} by ONNX Runtime beside the dense model by torch, {report['executor']['device']}")  # noqa: T201
        for measure, (ratio, low, high) in said["ratios"].items():
            ours, theirs = (said[role]["measures"][measure] for role in ("artifact", "baseline"))
            ends = f"{ratio:.2f} ({low:.2f} to {high:.2f})" if low < high else f"{ratio:.2f}"
            print(f"  {SPEEDS[measure].title:20}{ours:>16,.2f}{theirs:>16,.2f}   ratio {ends}")  # noqa: T201


if __name__ == "__main__":
    main()
