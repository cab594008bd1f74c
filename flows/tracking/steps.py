"""One step's run in MLflow. The step only says what there is; a thread of the run's sends it."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flows.tracking.batches import Buffer, now, send, valid_key
from flows.tracking.connect import NOTE, Tracking
from flows.tracking.datasets import Dataset, inputs
from flows.tracking.ends import End, Status
from flows.tracking.leftovers import PARENT
from stages.runtime.artifacts import BLOBS, Store
from stages.runtime.contract import Manifest, StageError, Unavailable
from stages.runtime.fingerprint import digest_bytes

SMALL_BYTES = 1_000_000
"""Files below this size are logged when a person could read them; all others are named in files.json."""
READABLE = frozenset({".json", ".jsonl", ".txt", ".yaml", ".yml", ".csv", ".md", ".html"})

_END = "end"
_MOST_CHARACTERS = 4000
"""Of an error in a description, which MLflow would cut."""

Told = Callable[[str, Exception], None]
"""Who hears what did not come about, and why."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A step at its beginning.

    Attributes:
        name: the run's.
        tags: the run's.
        params: the step's, flattened.
        read: what it reads from outside.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    read: tuple[Dataset, ...] = ()


class Parent(Protocol):
    """The recipe's run."""

    @property
    def tracking(self) -> Tracking:
        """Where it is recorded, waited for."""

    @property
    def id(self) -> str:
        """MLflow's own name of it, waited for."""


class StepRun:
    """One step's run. It is a `Progress` listener itself, ends once, and never waits for MLflow."""

    def __init__(self, parent: Parent, opening: Opening, told: Told) -> None:
        self.name = opening.name
        self.curve: dict[str, list[tuple[int, float]]] = {}
        self._parent, self._opening, self._told = parent, opening, told
        self._waiting = Buffer(params=dict(opening.params))
        self._notes: list[str] = []
        self._lock, self._sending = threading.Lock(), threading.RLock()
        self._id, self._began = "", _milliseconds()
        self._end: End | None = None
        self._ended = 0
        self._made: tuple[Manifest, Store | None] | None = None
        self._done: set[str] = set()
        self._lost: set[str] = set()

    @property
    def id(self) -> str:
        """MLflow's run, begun when it is first asked for."""
        with self._sending:
            if not self._id:
                tags = {**self._opening.tags, PARENT: self._parent.id}
                experiment = self._parent.tracking.experiment_id
                made = self._parent.tracking.client.create_run(experiment, self._began, tags, self.name)
                self._id = made.info.run_id
            return self._id

    @property
    def progress(self) -> StepRun:
        """The listener of this step."""
        return self

    def advanced(self, done: float, total: float) -> None:
        """See Progress. The bar is the terminal's affair."""

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress. Kept in memory until it is sent."""
        with self._lock:
            self._waiting.points.append((valid_key(name), float(value), _milliseconds(), step))
            self.curve.setdefault(name, []).append((step, float(value)))

    def note(self, text: str) -> None:
        """See Progress. The last note stands as a tag while the step runs, all of them in notes.txt after it."""
        with self._lock:
            self._notes.append(text)
            self._waiting.tags["enginery.note"] = text

    def finished(
        self, manifest: Manifest, fingerprint: str, uri: str, cached: bool, store: Store | None = None
    ) -> None:
        """The step's artifact is sealed.

        Args:
            manifest: of the artifact.
            fingerprint: of the artifact.
            uri: of the store.
            cached: it stood already: its files are with the run that made it and are not logged again.
            store: where small files are read from; without it they are named only.
        """
        made = manifest.provenance
        tags = {
            "enginery.stage": manifest.work.stage,
            "enginery.kind": str(manifest.kind),
            "enginery.fingerprint": fingerprint,
            "enginery.uri": f"{uri}#{fingerprint}",
            "enginery.cached": str(cached).lower(),
            "enginery.device": made.device,
            "enginery.commit": made.commit,
        }
        if not cached:
            # Facts about a machine and no measure of the model: as metrics each would be a chart of one bar.
            tags |= {"enginery.seconds": f"{made.seconds:.2f}", "enginery.peak_rss_bytes": str(made.peak_rss_bytes)}
            self._made = (manifest, store)
        self._close("FINISHED", tags, {**manifest.metrics, "artifact_bytes": float(manifest.size_bytes)})

    def failed(self, error: BaseException) -> None:
        """The step ended by an error."""
        said = str(error) or type(error).__name__
        self._close("FAILED", {"enginery.error": said, NOTE: f"**failed**\n\n```\n{said[:_MOST_CHARACTERS]}\n```"})

    def interrupted(self) -> None:
        """The step was cut off; nothing happens when it ended before."""
        self._close("KILLED", {NOTE: "**interrupted**: the same command goes on from what this step has kept."})

    def flush(self) -> None:
        """Send what waits; when MLflow does not answer, keep it for the next time. A curve fails no run."""
        try:
            self.settle()
        except Unavailable:
            pass
        # Any error: the stage goes on, and what the page then lacks is told.
        except Exception as error:  # noqa: BLE001
            self._tell("the run", error)

    def settle(self) -> None:
        """Send what waits, and the end once it has come. What MLflow refuses is told and left out.

        Raises:
            Unavailable: it does not answer; what was not sent is kept.
        """
        with self._sending:
            with self._lock:
                end = self._end
            if _END in self._done:
                return
            run = self.id
            self._part("what is read", self._inputs_logged)
            self._sent()
            if end is None:
                return
            self._part("the notes", self._notes_logged)
            self._part("the files", self._files_logged)
            self._parent.tracking.client.set_terminated(run, end.status, self._ended)
            self._done.add(_END)

    def _close(self, status: Status, tags: Mapping[str, str], figures: Mapping[str, float] | None = None) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._ended = _milliseconds()
            self._waiting.points += now(figures or {})
            self._waiting.tags |= tags
            self._end = End(status)

    def _part(self, what: str, do: Callable[[], None]) -> None:
        """Do it once; what is refused is told and not asked for again."""
        if what in self._done:
            return
        try:
            do()
        except Unavailable:
            raise
        # Any error, such as a full disk: the artifact is sealed all the same, and the run has to be ended.
        except Exception as error:  # noqa: BLE001
            self._tell(what, error)
        self._done.add(what)

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._lost:
            self._lost.add(what)
            self._told(f"{what} of {self.name} in MLflow", error)

    def _sent(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, Buffer()
        try:
            send(self._parent.tracking.client, self.id, taken)
        except Unavailable:
            with self._lock:
                self._waiting = taken.before(self._waiting)
            raise
        except StageError as error:
            self._tell("the figures", error)
            send(self._parent.tracking.client, self.id, Buffer(tags=taken.tags))

    def _inputs_logged(self) -> None:
        if self._opening.read:
            self._parent.tracking.client.log_inputs(self.id, inputs(self._opening.read))

    def _notes_logged(self) -> None:
        if self._notes:
            self._parent.tracking.client.log_text(self.id, "\n".join(self._notes) + "\n", "notes.txt")

    def _files_logged(self) -> None:
        if self._made:
            self._log_files(*self._made)

    def _log_files(self, manifest: Manifest, store: Store | None) -> None:
        listed: dict[str, dict[str, str | int | bool]] = {}
        with tempfile.TemporaryDirectory(prefix="enginery-files-") as folder:
            for name, entry in manifest.files.items():
                small = entry.size < SMALL_BYTES and Path(name).suffix in READABLE
                data = store.objects.read(f"{BLOBS}{entry.sha256[:2]}/{entry.sha256}") if small and store else None
                whole = data is not None and digest_bytes(data) == entry.sha256
                if data is not None and whole:
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                listed[name] = {"sha256": entry.sha256, "size": entry.size, "logged": whole}
            Path(folder, "files.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
            self._parent.tracking.client.log_artifacts(self.id, folder)


def _milliseconds() -> int:
    return int(time.time() * 1000)
