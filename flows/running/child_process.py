"""Run one step: inline, in a child process that gets the store and nothing else, or in a work pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.running.cgroup_memory import memory_limit_bytes, memory_peak_bytes, out_of_memory_kills
from flows.running.order import Order, Pool
from stages import stage
from stages.__main__ import rebuilt
from stages.adapters.connect import connect
from stages.runtime.artifacts import Store
from stages.runtime.contract import DoesNotFit, Interrupted, Progress, StageError
from stages.runtime.execute import Outcome, execute
from stages.runtime.fingerprint import ROOT, canonical, fingerprint
from stages.runtime.progress import forward

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT", "TZ")
_OUTSIDE = (
    "HF_",
    "PIP_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT",
    "REQUESTS_CA",
)
_STORE = ("AWS_", "ENGINERY_", "COVERAGE_", "MPLCONFIGDIR", "OPENBLAS_")
_REACH_OUTSIDE = ("fetch", "corpus")


@dataclass
class Launcher:
    """Starts steps and can end those that run.

    Attributes:
        store: where artifacts are sealed.
        mode: `process` (a child a step: its memory is its own, a crash of it is not ours), `inline`, or `pool`.
        threads: threads of computation a step may use.
        logs: folder for what children write to standard error.
        minutes: after so long a child is ended; its partial state is kept. None for no limit.
        dispatcher: brings steps to work pools; only with `pool`.
    """

    store: Store
    mode: str
    threads: int
    logs: Path
    minutes: float | None = None
    dispatcher: Pool | None = None
    _running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False
    _stopped: bool = False

    def run(self, order: Order, progress: Progress) -> Outcome:
        """Run one step to its sealed artifact.

        Raises:
            StageError: the stage's own error, or a child that ended without a word.
            Interrupted: the run was stopped.
        """
        self.check_open(order.step)
        if self.dispatcher:
            return self.dispatcher.launch(order, progress)
        if self.mode == "inline":
            definition = stage(order.stage)
            return execute(
                definition, order.params, order.work, self.store, progress, step=order.step, force=order.force
            )
        return self._in_child(order, progress)

    def check_open(self, step: str) -> None:
        """Raise Interrupted once no other step is to start."""
        if self._closed:
            raise Interrupted(f"step {step} was not started: another failed, or the run is being stopped")

    def start_no_more(self) -> None:
        """Let what runs come to its end, and start nothing else."""
        self._closed = True

    def stop(self) -> None:
        """End every running child and start no other. What they sealed stays; partial state is kept."""
        with self._guard:
            self._closed = self._stopped = True
            children = list(self._running.values())
        if self.dispatcher:
            self.dispatcher.stop()
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()

    def _in_child(self, order: Order, progress: Progress) -> Outcome:
        last = self.ask(order, progress)
        manifest = self.store.manifest(last["identity"])
        if manifest is None:
            raise StageError(f"step {order.step} said sealed, but {last['identity'][:12]} is not in the store")
        return Outcome(last["identity"], manifest, cached=last["cached"], changed=last["changed"])

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def ask(self, order: Order, progress: Progress, *wanted: str, threads: int | None = None) -> dict[str, Any]:
        """Start a step's child and hear it out; returns its last event.

        Args:
            order: the step; no other child may run under its name.
            progress: who listens.
            wanted: options of `python -m stages` that ask for something else than the whole artifact.
            threads: threads of computation it may use, where that is not the launcher's number.

        Raises:
            StageError: the stage's own error, or a child that ended without a word.
            Interrupted: the run was stopped.
        """
        if self._stopped:
            raise Interrupted(f"step {order.step} was not started: the run is being stopped")
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{order.step}.stderr"
        ooms = out_of_memory_kills()
        with self._child(order, log, wanted, threads) as child, _ended_after(child, self.minutes) as late:
            last = _listen(child, progress)
            code = child.wait()
        if last.get("event", "error") != "error":
            return last
        if self._stopped:
            raise Interrupted(f"step {order.step} was stopped")
        if late.is_set():
            raise _too_slow(order.step, self.minutes)
        if last.get("event") == "error":
            raise rebuilt(last)
        raise _ended_silently(order.step, code, log, out_of_memory_kills() - ooms)

    @contextmanager
    def _child(
        self, order: Order, log: Path, wanted: tuple[str, ...], threads: int | None
    ) -> Iterator[subprocess.Popen[str]]:
        with log.open("w", encoding="utf-8") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "stages", order.stage, "--work", str(self._written(order)),
                 "--store", self.store.uri, "--scratch", str(self.store.scratch), *wanted],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment(order.stage, threads),
            )  # fmt: skip
        with self._guard:
            self._running[order.step] = child
            if self._stopped:  # while this one started
                child.send_signal(signal.SIGTERM)
        try:
            yield child
        except BaseException:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
        finally:
            with self._guard:
                self._running.pop(order.step, None)
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()

    def _written(self, order: Order) -> Path:
        path = self.store.scratch / "works" / f"{fingerprint(order.work)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        whole.write_bytes(canonical(order.as_json()))
        whole.replace(path)
        return path

    def _environment(self, name: str, most: int | None = None) -> dict[str, str]:
        prefixes = (*_STORE, *_OUTSIDE) if name in _REACH_OUTSIDE else _STORE
        kept = {k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith(prefixes)}
        kept.pop("ENGINERY_WEBHOOK_SECRET", None)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        threads = str(most or self.threads)
        offline = {} if name in _REACH_OUTSIDE else {"HF_HUB_OFFLINE": "1"}
        return kept | offline | {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            # Tensors of a few MB come and go all the time: freed blocks are kept for the next one, since memory from
            # the system costs more time than the products that fill it. Larger ones go back at once.
            "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
            "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
        }  # fmt: skip


def _listen(child: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    last: dict[str, Any] = {}
    assert child.stdout is not None
    for line in child.stdout:
        event = json.loads(line)
        if not forward(event, progress):
            last = event
    return last


@contextmanager
def _ended_after(child: subprocess.Popen[str], minutes: float | None) -> Iterator[threading.Event]:
    """End a child that takes longer; the event is set when that was done."""
    late = threading.Event()

    def end() -> None:
        late.set()
        child.send_signal(signal.SIGTERM)

    timer = threading.Timer(60 * (minutes or 0), end)
    if minutes is not None:
        timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _too_slow(step: str, minutes: float | None) -> DoesNotFit:
    return DoesNotFit(
        f"step {step} took longer than it may and was ended",
        measured=f"more than {minutes:g} min",
        limit=f"{minutes:g} min",
        remedy="Its partial state is kept: the same command goes on from there. Or raise the stage's `minutes`.",
    )


def _ended_silently(step: str, code: int, log: Path, ooms: int) -> StageError:
    tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
    if ooms > 0:
        limit, peak = memory_limit_bytes(), memory_peak_bytes()
        return DoesNotFit(
            f"step {step} was killed: memory ran out",
            measured=f"peak {peak / 1e9:.2f} GB" if peak else None,
            limit=f"{limit / 1e9:.2f} GB",
            remedy="Use shorter windows, fewer steps at once (--jobs 1), or give it more memory.",
        )
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return StageError(
        f"step {step} ended {how} without a result",
        remedy=f"The same command goes on from its partial state. Its last words, in {log}: {tail or 'none'}",
    )


def open_launcher(store_uri: str, scratch: Path, *, mode: str, threads: int, logs: Path) -> Launcher:
    """A launcher on the store at `store_uri`."""
    return Launcher(connect(store_uri, scratch), mode, threads, logs)
