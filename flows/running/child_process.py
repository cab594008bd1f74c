"""Run one step: inline, in a child process that gets the store and nothing else, or in a work pool."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.running.child_environment import child_environment
from flows.running.child_events import MALFORMED, hear
from flows.running.order import Order, Pool
from flows.running.process_group import ProcessGroup, end, ended_after
from stages import stage
from stages.__main__ import rebuilt
from stages.adapters.connect import connect
from stages.runtime.artifacts import Store
from stages.runtime.cgroup_memory import memory_limit_bytes, memory_peak_bytes, out_of_memory_kills
from stages.runtime.contract import DoesNotFit, Interrupted, Progress, StageError
from stages.runtime.execute import Outcome, execute
from stages.runtime.fingerprint import canonical, fingerprint

_TEARDOWN_S = 10.0
"""From a child's last event to its end: an interpreter that takes longer to fold up is killed."""
_SHOWN = 200
"""Characters of a line that is no event."""


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
    _running: dict[str, ProcessGroup] = field(default_factory=dict)
    _guard: threading.RLock = field(default_factory=threading.RLock)  # a signal's handler may call `stop`
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

    def stop(self, *, now: bool = False) -> None:
        """End every running child and start no other. What they sealed stays; partial state is kept.

        All end at once, in little more than the grace. A call beside one that goes on waits with it.

        Args:
            now: leave the grace out, also for a call that goes on.
        """
        with self._guard:
            self._closed = self._stopped = True
            children = list(self._running.values())
        end(children, now=now)
        if self.dispatcher:
            self.dispatcher.stop()

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
        with self._child(order, log, wanted, threads) as child, ended_after(child, self.minutes) as late:
            last = hear(child, progress)
            if last.get("event") != MALFORMED:
                child.ended_within(_TEARDOWN_S)
        match last.get("event"):
            case "error" | "malformed" | None if self._stopped:
                raise Interrupted(f"step {order.step} was stopped")
            case "error" | "malformed" | None if late.is_set():
                raise _too_slow(order.step, self.minutes)
            case "error":
                raise rebuilt(last)
            case "malformed":
                raise _malformed(order.step, last["line"], log)
            case None:
                raise _ended_silently(order.step, child.poll(), log, out_of_memory_kills() - ooms)
        return last

    @contextmanager
    def _child(self, order: Order, log: Path, wanted: tuple[str, ...], threads: int | None) -> Iterator[ProcessGroup]:
        """A step's child, registered; whatever way the block ends, nothing of it is left."""
        with log.open("w", encoding="utf-8") as errors:
            child = ProcessGroup(
                [sys.executable, "-m", "stages", order.stage, "--work", str(self._written(order)),
                 "--store", self.store.uri, "--scratch", str(self.store.scratch), *wanted],
                child_environment(order.stage, threads or self.threads),
                errors,
            )  # fmt: skip
        try:
            with self._guard:
                self._running[order.step] = child
                stopped = self._stopped  # while this one started
            if stopped:
                end([child], now=True)
            yield child
        except BaseException:
            end([child])
            raise
        finally:
            end([child], now=True)
            with self._guard:
                self._running.pop(order.step, None)
            child.close()

    def _written(self, order: Order) -> Path:
        path = self.store.scratch / "works" / f"{fingerprint(order.work)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        whole.write_bytes(canonical(order.as_json()))
        whole.replace(path)
        return path


def _too_slow(step: str, minutes: float | None) -> DoesNotFit:
    return DoesNotFit(
        f"step {step} took longer than it may and was ended",
        measured=f"more than {minutes:g} min",
        limit=f"{minutes:g} min",
        remedy="Its partial state is kept: the same command goes on from there. Or raise the stage's `minutes`.",
    )


def _malformed(step: str, line: str, log: Path) -> StageError:
    return StageError(
        f"step {step} said what is no event, and was ended",
        measured=repr(line[:_SHOWN]) + ("..." if len(line) > _SHOWN else ""),
        limit="an event a line, in JSON",
        remedy=f"Stage and flow may be of two versions: install them from one commit. Its last words: {log}",
    )


def _ended_silently(step: str, code: int | None, log: Path, ooms: int) -> StageError:
    tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
    if ooms > 0:
        limit, peak = memory_limit_bytes(), memory_peak_bytes()
        return DoesNotFit(
            f"step {step} was killed: memory ran out",
            measured=f"peak {peak / 1e9:.2f} GB" if peak else None,
            limit=f"{limit / 1e9:.2f} GB",
            remedy="Use shorter windows, fewer steps at once (--jobs 1), or give it more memory.",
        )
    if code is None:
        return StageError(
            f"step {step} was killed and did not go", remedy="The kernel holds it: look at the disk that it uses."
        )
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return StageError(
        f"step {step} ended {how} without a result",
        remedy=f"The same command goes on from its partial state. Its last words, in {log}: {tail or 'none'}",
    )


def open_launcher(store_uri: str, scratch: Path, *, mode: str, threads: int, logs: Path) -> Launcher:
    """A launcher on the store at `store_uri`."""
    return Launcher(connect(store_uri, scratch), mode, threads, logs)
