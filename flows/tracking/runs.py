"""Runs, curves and small files in MLflow: one parent run a recipe run, one child run a step.

Steps run in threads at once, so every call names its run: the fluent interface keeps the active run in global state.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.tracking.batches import Buffer, flattened, now, send, valid_key
from flows.tracking.connect import Tracking, answered
from stages.runtime.artifacts import BLOBS, Store
from stages.runtime.contract import Interrupted, Manifest
from stages.runtime.fingerprint import digest_bytes

if TYPE_CHECKING:
    pass

SMALL_BYTES = 1_000_000
"""Files below this size are logged when a person could read them; all others are named in files.json."""
READABLE = frozenset({".json", ".jsonl", ".txt", ".yaml", ".yml", ".csv", ".md", ".html"})
FLUSH_S = 2.0


@dataclass(frozen=True)
class RecipeRun:
    """The parent run."""

    tracking: Tracking
    id: str
    closed: threading.Event = field(default_factory=threading.Event)
    steps: list[StepRun] = field(default_factory=list)

    def child(self, step_name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> StepRun:
        """Begin a step's run. Its params are sent with the first batch."""
        made = self.tracking.client.create_run(
            self.tracking.experiment_id,
            run_name=step_name,
            tags={**_source(), "mlflow.parentRunId": self.id, "enginery.step": step_name, **(tags or {})},
        )
        step = StepRun(self.tracking, made.info.run_id, step_name, Buffer(params=flattened(params)))
        self.steps.append(step)
        return step

    def summary(self, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Figures and tags of the whole run: the verdict, the version, what was executed."""
        send(self.tracking.client, self.id, Buffer(points=now(metrics or {}), tags=dict(tags or {})))

    def artifact(self, path: Path) -> None:
        """Log a file of the whole run, such as the report."""
        self.tracking.client.log_artifact(self.id, str(path))

    def write_until_closed(self) -> None:
        """Send every step's curve each few seconds. A stage never waits for MLflow."""
        while not self.closed.wait(FLUSH_S):
            for step in list(self.steps):
                step.flush()

    def end_children(self) -> None:
        """A step that neither finished nor failed was cut off."""
        for step in self.steps:
            step.interrupted()


@contextmanager
def recipe_run(
    tracking: Tracking,
    recipe_name: str,
    run_id: str,
    tags: Mapping[str, str] | None = None,
    recipe_text: str = "",
    ended: Sized = (),
) -> Iterator[RecipeRun]:
    """One recipe run as a parent run; ended as finished, failed or killed by how the block ends.

    Once `ended` holds the run's result, it is finished: an interrupt undoes no promotion.
    """
    _end_orphans(tracking)
    ours = {"enginery.run": run_id, "enginery.recipe": recipe_name, "enginery.process": _process()}
    made = tracking.client.create_run(
        tracking.experiment_id, run_name=recipe_name, tags={**_source(), **ours, **(tags or {})}
    )
    parent = RecipeRun(tracking, made.info.run_id)
    writer = threading.Thread(target=parent.write_until_closed, name="mlflow-curves", daemon=True)
    writer.start()
    status = "FAILED"
    try:
        if recipe_text:
            tracking.client.log_text(parent.id, recipe_text, "recipe.yaml")
        yield parent
        status = "FINISHED"
    except (KeyboardInterrupt, Interrupted):
        status = "KILLED"
        raise
    finally:
        status = "FINISHED" if ended else status
        parent.closed.set()
        writer.join()
        parent.end_children()
        tracking.client.set_terminated(parent.id, status)


class StepRun:
    """One step's run. It is a `Progress` listener itself, and ends once."""

    def __init__(self, tracking: Tracking, run_id: str, name: str, waiting: Buffer) -> None:
        self.id, self.name = run_id, name
        self.curve: dict[str, list[tuple[int, float]]] = {}
        self._tracking, self._waiting = tracking, waiting
        self._notes: list[str] = []
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._ended = False

    @property
    def progress(self) -> StepRun:
        """The listener of this step."""
        return self

    def advanced(self, done: float, total: float) -> None:
        """See Progress. The bar is the terminal's affair."""

    def metric(self, name: str, value: float, step: int) -> None:
        """See Progress. Kept in memory; the writer sends it."""
        with self._lock:
            self._waiting.points.append((valid_key(name), float(value), int(time.time() * 1000), step))
            self.curve.setdefault(name, []).append((step, float(value)))

    def note(self, text: str) -> None:
        """See Progress. The last note stands as a tag while the step runs, all of them in notes.txt after it."""
        with self._lock:
            self._notes.append(text)
            self._waiting.tags["enginery.note"] = text

    def flush(self) -> None:
        """Send what waits; when MLflow does not answer, keep it for the next time."""
        from mlflow.exceptions import MlflowException

        with self._sending:
            with self._lock:
                taken, self._waiting = self._waiting, Buffer()
            try:
                send(self._tracking.client, self.id, taken)
            except MlflowException:
                with self._lock:
                    self._waiting.params = taken.params | self._waiting.params
                    self._waiting.points = taken.points + self._waiting.points
                    self._waiting.tags = taken.tags | self._waiting.tags

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
        figures = {**manifest.metrics, "artifact_bytes": float(manifest.size_bytes)}
        if not cached:
            figures |= {"seconds": made.seconds, "peak_rss_bytes": float(made.peak_rss_bytes)}
            self._log_files(manifest, store)
        tags = {
            "enginery.stage": manifest.work.stage,
            "enginery.kind": str(manifest.kind),
            "enginery.fingerprint": fingerprint,
            "enginery.uri": f"{uri}#{fingerprint}",
            "enginery.cached": str(cached).lower(),
            "enginery.device": made.device,
            "enginery.commit": made.commit,
        }
        self._end("FINISHED", tags, figures)

    def failed(self, error: BaseException) -> None:
        """The step ended by an error."""
        self._end("FAILED", {"enginery.error": str(error) or type(error).__name__})

    def interrupted(self) -> None:
        """The step was cut off; nothing happens when it ended before."""
        self._end("KILLED", {})

    def _end(self, status: str, tags: Mapping[str, str], figures: Mapping[str, float] | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        with self._sending, self._lock:
            last = self._waiting
            last.points += now(figures or {})
            last.tags |= tags
            self._waiting = Buffer()
        with answered(self._tracking.uri):
            if self._notes:
                self._tracking.client.log_text(self.id, "\n".join(self._notes) + "\n", "notes.txt")
            send(self._tracking.client, self.id, last)
            self._tracking.client.set_terminated(self.id, status)

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
            self._tracking.client.log_artifacts(self.id, folder)


def _source() -> dict[str, str]:
    return {"mlflow.source.name": "enginery", "mlflow.source.type": "LOCAL"}


def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _end_orphans(tracking: Tracking) -> None:
    """Runs of processes of this machine that were killed would stand as running for ever."""
    running = tracking.client.search_runs([tracking.experiment_id], "attributes.status = 'RUNNING'", max_results=200)
    gone = set()
    for run in running:
        host, _, pid = run.data.tags.get("enginery.process", "").rpartition(":")
        if host == socket.gethostname() and not Path("/proc", pid).exists():
            gone.add(run.info.run_id)
    for run in running:
        if run.info.run_id in gone or run.data.tags.get("mlflow.parentRunId") in gone:
            tracking.client.set_terminated(run.info.run_id, "KILLED")
