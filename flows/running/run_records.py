"""What is remembered of each run beside the store: recipe, command, log, process, result.

A record is a folder `<scratch>/runs/<name>` with `run.json`, `recipe.yaml`, `log.jsonl`, `pid` and, at the end,
`result.json` or `failure.json`.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows.recipe.model import Recipe
from flows.results import RunLine, RunResult, RunState
from stages.runtime.contract import Interrupted, StageError

_SLACK_SECONDS = 1.0
"""The kernel counts a process's start in clock ticks; another process of the same number starts much later."""


@dataclass(frozen=True)
class Record:
    """The folder of one run."""

    folder: Path
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def facts(self) -> dict[str, Any]:
        """Recipe's name, command, working directory, start, in `run.json`."""
        return _json(self.folder / "run.json") or {}

    @property
    def pid(self) -> int | None:
        """The process that runs it, None when it has ended."""
        found = _json(self.folder / "pid")
        if not found or found.get("host") != socket.gethostname():
            return None
        return found["pid"] if _alive(found) else None

    @property
    def result(self) -> RunResult | None:
        """What it came to, None while it runs or when it broke."""
        path = self.folder / "result.json"
        return RunResult.model_validate_json(path.read_bytes()) if path.is_file() else None

    def recipe(self) -> str:
        """The recipe as it ran, with every `--set` applied."""
        return (self.folder / "recipe.yaml").read_text(encoding="utf-8")

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event with the time; safe from several threads."""
        line = json.dumps({"at": _now(), **event}, ensure_ascii=False, default=str) + "\n"
        with self._guard, (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line)

    def events(self) -> Iterator[dict[str, Any]]:
        """The log from its beginning; a line that a killed process left half written is skipped."""
        path = self.folder / "log.jsonl"
        # By bytes: a string's `splitlines` cuts at a U+2028 of what a stage noted, too, and a cut event would be lost.
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def finish(self, result: RunResult) -> None:
        """Record the end of a run that was judged."""
        _write(self.folder / "result.json", result.model_dump_json(indent=1))
        self.log({"event": "finished"})
        self._ended()

    def failed(self, error: BaseException) -> None:
        """Record the end of a run that broke or was interrupted."""
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
        said = str(error) or ("interrupted" if interrupted else type(error).__name__)
        _write(self.folder / "failure.json", json.dumps({"error": said, "interrupted": interrupted, "at": _now()}))
        self.log({"event": "error", "what": said})
        self._ended()

    def cancel(self) -> int:
        """Ask the run's process to end as by Ctrl-C; returns its number.

        Raises:
            StageError: it has ended, or runs on another machine.
        """
        found = _json(self.folder / "pid")
        if found and found.get("host") != socket.gethostname():
            raise StageError(f"run {self.name} is on {found.get('host')}", remedy="Cancel it there.")
        pid = self.pid
        if pid is None:
            raise StageError(f"run {self.name} has ended", remedy="`enginery runs` shows which are running.")
        os.kill(pid, signal.SIGTERM)
        return pid

    def line(self) -> RunLine:
        """The run in one line."""
        running = self.pid is not None  # first: what ends meanwhile has left its word
        facts, result = self.facts, self.result
        failure = _json(self.folder / "failure.json") or {}
        state: RunState
        if result:
            state = result.verdict
        elif failure:
            state = "interrupted" if failure.get("interrupted") else "error"
        else:
            state = "running" if running else "ended"
        return RunLine(
            run=self.name,
            recipe=str(facts.get("recipe", "")),
            state=state,
            started=str(facts.get("started", "")),
            seconds=result.seconds if result else None,
            model=f"{result.model.name} {result.model.version}" if result and result.model else "",
            error=str(failure.get("error", "")),
        )

    def _ended(self) -> None:
        (self.folder / "pid").unlink(missing_ok=True)


@dataclass(frozen=True)
class Recorder:
    """Keeps a step's notes and curve in the run's record."""

    record: Record
    step: str

    def advanced(self, done: float, total: float) -> None:
        """See Progress. A bar is not worth a record."""

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress."""
        self.record.log({"event": "metric", "step": self.step, "name": name, "value": value, "at_step": step})

    def note(self, text: str) -> None:
        """See Progress."""
        self.record.log({"event": "note", "step": self.step, "text": text})


def open_run(scratch: Path, recipe: Recipe, command: Sequence[str]) -> Record:
    """Begin the record of a run of this process."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    record = Record(scratch / "runs" / f"{stamp}-{secrets.token_hex(2)}")
    record.folder.mkdir(parents=True)
    facts = {
        "recipe": recipe.name,
        "command": list(command),
        "folder": str(Path.cwd()),
        "started": _now(),
    }
    own = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}
    _write(record.folder / "pid", json.dumps(own))
    _write(record.folder / "recipe.yaml", as_yaml(recipe))
    # Last: whoever finds what this says finds a run that has a process.
    _write(record.folder / "run.json", json.dumps(facts, indent=1))
    return record


def as_yaml(recipe: Recipe) -> str:
    """A recipe as a file that `load_recipe` reads again."""
    data = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def records(scratch: Path) -> list[Record]:
    """Every run recorded below `scratch`, the newest last."""
    folder = scratch / "runs"
    return [Record(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []


def find_run(scratch: Path, name: str) -> Record:
    """The run whose name begins with `name`, or the newest for `last`.

    Raises:
        StageError: none or several.
    """
    known = records(scratch)
    matching = known[-1:] if name == "last" else [record for record in known if record.name.startswith(name)]
    if len(matching) != 1:
        raise StageError(
            f"{'no run' if not matching else 'more than one run'} begins with {name!r}",
            measured=len(matching),
            limit=1,
            remedy="`enginery runs` shows the runs beside this store; `last` names the newest.",
        )
    return matching[0]


def _alive(found: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(found["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and (
            abs(process.create_time() - found["started"]) < _SLACK_SECONDS
        )
    except psutil.NoSuchProcess:
        return False


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def _write(path: Path, text: str) -> None:
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
