"""Run techniques and peers, each in processes of its own, and keep what each came to."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.reporting.terminal import StepListener, TerminalProgress
from stages import stage
from stages.adapters.connect import pins
from stages.runtime.artifacts import Store
from stages.runtime.execute import execute, work_of
from stages.runtime.fingerprint import ROOT, canonical, code_digest, digest_bytes, digest_file, stage_digest
from stages.runtime.progress import forward
from tests.benchmarks import results
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.results import Row
from tests.benchmarks.techniques import CONTROLS, Technique

SPLITS = {
    "text": {"calibrate": 0.35, "train": 0.4, "validate": 0.05, "test": 0.2},
    "other": {"validate": 0.3, "test": 0.7},
}
HERE = Path(__file__).parent


class FailedError(Exception):
    """A child refused or broke; its text says why."""


@dataclass(frozen=True)
class Options:
    """What was asked.

    Attributes:
        model: source of the dense checkpoint, as `fetch` takes it.
        text: source of the text that models are calibrated and judged on.
        other: source of the other text.
        windows: test windows of each text.
        tokens: their length, and that of calibration windows.
        calibration: calibration windows; None leaves each stage and each peer its own number, and gives controls 32.
        budget: tokens of `recover`, or minutes at a rate.
        kl_windows: windows on which KL is measured.
        again: measure also what is measured already.
    """

    model: str
    text: str
    other: str
    windows: int = 40
    tokens: int = 512
    calibration: int | None = None
    budget: str | int | None = None
    kl_windows: int = 8
    again: bool = False


@dataclass(frozen=True)
class Bench:
    """One bench: its options, its artifacts, its folder.

    Attributes:
        options: what was asked.
        folder: of windows, checkpoints, logs and rows.
        inputs: dense, text, other -> folder.
        identities: the same -> fingerprint.
        terminal: who shows what runs.
        interpreters: distribution -> the Python that has this peer.
    """

    options: Options
    folder: Path
    inputs: dict[str, Path]
    identities: dict[str, str]
    terminal: TerminalProgress
    interpreters: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> Path:
        """Where rows are kept."""
        return self.folder / "rows.jsonl"

    @property
    def windows(self) -> Path:
        """The file of all windows."""
        return self.folder / "windows.safetensors"


def sources(options: Options, store: Store, terminal: TerminalProgress) -> dict[str, str]:
    """Fetch the model and both texts by the product's own stages; role -> fingerprint. Sealed ones are found."""
    found = {}
    asked: dict[str, tuple[str, dict[str, Any]]] = {"dense": ("fetch", {"source": options.model})}
    for name in ("text", "other"):
        asked[name] = ("corpus", {"source": getattr(options, name), "splits": SPLITS[name]})
    for name, (verb, params) in asked.items():
        definition, progress = stage(verb), terminal.for_step(name)
        made = definition.params.model_validate(params)
        if definition.pin:
            made = definition.pin(made, pins(store), progress)
        found[name] = execute(definition, made, work_of(definition, made, {}), store, progress, step=name).identity
    return found


def measured(bench: Bench, techniques: Sequence[Technique], peers: Sequence[Peer]) -> Iterator[Row]:
    """The dense row, then every technique's and peer's, as they come; rows that stand are not measured again.

    A technique's failure is its row, and that of those that read its checkpoint. Checkpoints go once nobody reads them.
    """
    yield _dense(bench)
    keys = _keys(bench, techniques)
    due, failed = _due(bench, techniques, keys), set[str]()
    for place, one in enumerate(techniques):
        row = _technique(bench, one, keys, failed, due=one.name in due)
        failed |= {one.name} if row.error else set()
        waiting = {name for later in techniques[place + 1 :] if later.name in due for name in later.inputs.values()}
        for old in techniques[: place + 1]:
            if old.name not in waiting:
                shutil.rmtree(_checkpoint(bench, old.name), ignore_errors=True)
        if one.scored or row.error:
            yield row
    for peer in peers:
        yield _peer(bench, peer)


def missing(peers: Sequence[Peer], interpreters: Mapping[str, str]) -> list[str]:
    """Distributions that neither this Python nor one of their own has."""
    found = {one.distribution: one.module.partition(".")[0] for one in peers if one.distribution not in interpreters}
    return sorted(name for name, package in found.items() if importlib.util.find_spec(package) is None)


def adapted(technique: Technique, options: Options) -> dict[str, Any]:
    """The technique's params with the windows and the budget that were asked for."""
    params = dict(technique.params)
    if technique.stage in CONTROLS:
        return params | {"windows": options.calibration or 32}
    fields = stage(technique.stage).params.model_fields
    if technique.stage == "recover":
        params |= {"window_tokens": min(256, options.tokens)}
        return params | ({} if options.budget is None else {"tokens": options.budget})
    if "window_tokens" in fields:
        params["window_tokens"] = options.tokens
        params |= {} if options.calibration is None else {"windows": options.calibration}
    return params


def _keys(bench: Bench, techniques: Sequence[Technique]) -> dict[str, str]:
    """Name -> identity of the row: code, params, and the identities of what it reads."""
    keys: dict[str, str] = {}
    for one in techniques:
        own = digest_file(HERE / "controls.py") if one.stage in CONTROLS else stage_digest(one.stage)
        read = {role: bench.identities.get(name) or keys[name] for role, name in one.inputs.items()}
        params = adapted(one, bench.options) | ({"as_long_as": keys[one.as_long_as]} if one.as_long_as else {})
        keys[one.name] = _key(bench, {"stage": one.stage, "params": params, "inputs": read, "code": own})
    return keys


def _due(bench: Bench, techniques: Sequence[Technique], keys: Mapping[str, str]) -> set[str]:
    """The techniques that have no row, and those whose checkpoint one of these reads and which is gone."""
    due, read = set[str](), set[str]()
    for one in reversed(techniques):
        gone = one.name in read and not _checkpoint(bench, one.name).is_dir()
        if gone or _standing(bench, one.name, keys[one.name]) is None:
            due.add(one.name)
            read |= set(one.inputs.values())
    return due


def _technique(bench: Bench, one: Technique, keys: Mapping[str, str], failed: set[str], *, due: bool) -> Row:
    key, folder = keys[one.name], _checkpoint(bench, one.name)
    if (row := _standing(bench, one.name, key)) and not due:
        return row
    if lost := failed & {*one.inputs.values(), one.as_long_as}:
        error = f"needs {', '.join(sorted(lost))}, which failed"
        bench.terminal.failed(one.name, error)
        return Row(one.name, about=one.about, error=error)
    shutil.rmtree(folder, ignore_errors=True)
    inputs = {role: bench.inputs.get(name) or _checkpoint(bench, name) for role, name in one.inputs.items()}
    params = adapted(one, bench.options)
    if one.stage in CONTROLS:
        inputs["windows"] = bench.windows
    if one.as_long_as:
        params["seconds"] = results.kept(bench.rows)[one.as_long_as].figures["seconds"]
    task = {"do": "run", "stage": one.stage, "params": params, "inputs": _texts(inputs), "output": str(folder)}
    judge = {"do": "score", "model": str(folder), **_scoring(bench)}
    return _measure(bench, one.name, key, [task, *([judge] if one.scored else [])], one.about)


def _peer(bench: Bench, one: Peer) -> Row:
    python = bench.interpreters.get(one.distribution, sys.executable)
    asked = {"peer": one.name, "python": python, "code": digest_file(HERE / "peers.py")}
    key = _key(bench, {**asked, "inputs": bench.identities})
    if row := _standing(bench, one.name, key):
        return row
    task = {"do": "peer", "peer": one.name, "calibration": bench.options.calibration, **_scoring(bench)}
    return _measure(bench, one.name, key, [task], one.about, python)


def _dense(bench: Bench) -> Row:
    options = bench.options
    key = _key(bench, {"inputs": bench.identities})
    cut = {
        "do": "windows",
        **_texts(bench.inputs),
        "path": str(bench.windows),
        "calibration": options.calibration or max(one.windows for one in PEERS),
    }
    if (row := _standing(bench, "dense", key)) and bench.windows.is_file():
        return row
    sizes = {"windows": options.windows, "tokens": options.tokens}
    found = child(bench, "windows", {**cut, **sizes})
    dense = str(bench.inputs["dense"])
    scores = child(bench, "dense", {"do": "score", "model": dense, **_scoring(bench), "kl_windows": 0})
    counts = f"{found['text']:.0f} and {found['other']:.0f} windows of {options.tokens} tokens"
    told = f"perplexity {scores['perplexity_text']:.3f}, elsewhere {scores['perplexity_other']:.3f}; {counts}"
    weights = sum(file.stat().st_size for file in bench.inputs["dense"].glob("*.safetensors"))
    scores = {name: value for name, value in scores.items() if not name.startswith("kl")}
    row = Row("dense", key, {**scores, "size_bytes": float(weights)}, {}, told)
    results.keep(bench.rows, row)
    return row


def _measure(
    bench: Bench, name: str, key: str, tasks: Sequence[Mapping[str, Any]], about: str, python: str = sys.executable
) -> Row:
    """One row by one or two children; a failure is a row that is not kept, so that the next bench tries again."""
    bench.terminal.started(name)
    found: dict[str, Any] = {}
    try:
        for task in tasks:
            found |= child(bench, name if task["do"] != "score" else f"{name} judged", task, python)
    except FailedError as error:
        shutil.rmtree(_checkpoint(bench, name), ignore_errors=True)
        bench.terminal.failed(name, str(error))
        return Row(name, about=about, error=str(error))
    metrics, tool = found.pop("metrics"), found.pop("tool", "")
    row = Row(name, key, found, metrics, "; ".join(filter(None, (tool, about))))
    results.keep(bench.rows, row)
    return row


def child(bench: Bench, name: str, task: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """Do a task in a fresh interpreter and return its result; what it prints besides goes to a log.

    Raises:
        FailedError: it refused, or ended without a result.
    """
    path, log = (bench.folder / f"{name.replace(':', '-').replace(' ', '-')}.{end}" for end in ("task.json", "log"))
    path.write_text(json.dumps(task), encoding="utf-8")
    last: dict[str, Any] = {}
    began = time.monotonic()
    command = [python, "-m", "tests.benchmarks.child", str(path)]
    listener: StepListener = bench.terminal.for_step(name)
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT) as process,
    ):
        for line in process.stdout or ():
            last = json.loads(line)
            forward(last, listener)
    path.unlink()
    if last.get("event") == "failed":
        raise FailedError(last["said"])
    if process.returncode or last.get("event") != "result":
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise FailedError(f"{said[-1][:300] if said else 'no word'} (exit {process.returncode}; see {log})")
    bench.terminal.finished(name, time.monotonic() - began, cached=False)
    result: dict[str, Any] = last["result"]
    return result


def _key(bench: Bench, what: Mapping[str, Any]) -> str:
    options = bench.options
    scored = [options.windows, options.tokens, options.calibration, options.kl_windows]
    code = [digest_file(HERE / name) for name in ("child.py", "scoring.py")]
    models = code_digest("stages.models.checkpoint.loading")
    return digest_bytes(canonical({**what, "scored": scored, "bench": [*code, models, *bench.identities.values()]}))


def _standing(bench: Bench, name: str, key: str) -> Row | None:
    row = results.kept(bench.rows).get(name)
    return row if row and row.key == key and not bench.options.again else None


def _checkpoint(bench: Bench, name: str) -> Path:
    return bench.folder / "checkpoints" / name.replace(":", "-")


def _scoring(bench: Bench) -> dict[str, Any]:
    return {
        "dense": str(bench.inputs["dense"]),
        "windows": str(bench.windows),
        "kl_windows": bench.options.kl_windows,
    }


def _texts(folders: Mapping[str, Path]) -> dict[str, str]:
    return {role: str(folder) for role, folder in folders.items()}
