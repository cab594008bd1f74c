"""A technique calibrated on one text: made, asked and forgotten, but for its sealed reports.

Artifacts are sealed in a store of the bench's own, so that what was measured is found again; checkpoints go once nobody
reads them. What a control or a peer makes is brought into the store by `fetch`: its digest is kept beside, and with it
the identities of its reports are known when it is gone.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.reporting.terminal import TerminalProgress
from flows.running.child_process import Launcher
from flows.running.order import Order
from stages import stage
from stages.adapters.connect import pins
from stages.runtime.artifacts import Store, blob_key
from stages.runtime.contract import StageError
from stages.runtime.execute import work_of
from stages.runtime.fingerprint import canonical, code_digest, digest_bytes, digest_file, fingerprint
from tests.benchmarks import bench
from tests.benchmarks.kept import ABILITIES, Reports
from tests.benchmarks.peers import Peer
from tests.benchmarks.techniques import CONTROLS, Technique

CODE = ("asked.py", "child.py", "controls.py", "lent.py", "peers.py", "peers_saved.py")


@dataclass(frozen=True)
class Sealing:
    """Where steps are run and sealed.

    Attributes:
        store: of the bench alone.
        launcher: runs a step.
        terminal: shows it.
    """

    store: Store
    launcher: Launcher
    terminal: TerminalProgress

    def order(self, step: str, verb: str, params: Mapping[str, Any], inputs: Mapping[str, str]) -> Order:
        """A step, its source pinned unless its digest is said."""
        definition = stage(verb)
        made = definition.params.model_validate(dict(params))
        if definition.pin and not params.get("digest"):
            made = definition.pin(made, pins(self.store), self.terminal.for_step(step))
        return Order(step=step.replace(":", "-"), stage=verb, params=made, work=work_of(definition, made, inputs))

    def holds(self, identity: str) -> bool:
        """Whether an artifact is sealed."""
        return self.store.manifest(identity) is not None

    def sealed(self, order: Order) -> str:
        """The identity of a step's artifact, made where it is not there."""
        identity = fingerprint(order.work)
        if not self.holds(identity):
            self.terminal.started(order.step)
            began = time.monotonic()
            try:
                self.launcher.run(order, self.terminal.for_step(order.step))
            except StageError as error:
                self.terminal.failed(order.step, str(error))
                raise
            self.terminal.finished(order.step, time.monotonic() - began, cached=False)
        return identity

    def drop(self, identity: str) -> None:
        """Take an artifact and the bytes that no other names."""
        manifest = self.store.manifest(identity)
        if manifest is None:
            return
        self.store.remove(identity)
        named = {entry.sha256 for _, one in self.store.manifests() for entry in one.files.values()}
        for digest in {entry.sha256 for entry in manifest.files.values()} - named:
            self.store.objects.delete(blob_key(digest))


@dataclass(frozen=True)
class Cells:
    """All techniques on one text.

    Attributes:
        sealing: where artifacts stand.
        bench: options, and `dense`, `text` (that of this calibration) and `other`: folders and identities.
        calibration: what the text is called.
        items: identity of the set of items.
        asks: ABILITIES and `other` -> params of `validate`.
        techniques: those that a technique may read, by name.
        failed: techniques that broke, with what was said.
    """

    sealing: Sealing
    bench: bench.Bench
    calibration: str
    items: str
    asks: Mapping[str, Mapping[str, Any]]
    techniques: Mapping[str, Technique] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def reports(self, one: Technique | Peer) -> Reports:
        """What `validate` says of a technique or a peer.

        Raises:
            StageError, FailedError: it, or one that it reads, could not be made or asked.
        """
        if isinstance(one, Peer) and one.save is None:
            return self._asked_by(one)
        try:
            known = self.identity(one)
            return self._read(one.name, known if known and self._measured(one.name, known) else self.made(one))
        except (StageError, bench.FailedError) as error:
            self.failed[one.name] = str(error)
            raise

    def dense(self) -> Reports:
        """What `validate` says of the dense model, which is the same for every text."""
        return self._read("dense", self.bench.identities["dense"])

    def due(self, one: Technique) -> bool:
        """Whether a technique is still to be made."""
        return one.name not in self.failed and not self._measured(one.name, self.identity(one))

    def drop(self, one: Technique | Peer) -> None:
        """Take the checkpoint of a technique or a peer, where it was one."""
        lent = isinstance(one, Peer) and one.save is None
        if not lent and (known := self.identity(one)):
            self.sealing.drop(known)

    def identity(self, one: Technique | Peer) -> str | None:
        """The identity of a checkpoint, also of one that is gone; None where it is known only once it is made."""
        if isinstance(one, Peer) or one.stage in CONTROLS:
            record = self._record(one)
            digest = record.read_text(encoding="utf-8") if record.is_file() else ""
            return fingerprint(self._fetch(one, digest).work) if digest else None
        inputs = {role: self._known(name) for role, name in one.inputs.items()}
        whole = {role: found for role, found in inputs.items() if found}
        return fingerprint(self._order(one, whole).work) if len(whole) == len(inputs) else None

    def made(self, one: Technique | Peer) -> str:
        """The identity of a checkpoint that is there."""
        known = self.identity(one)
        if known and self.sealing.holds(known):
            return known
        if isinstance(one, Peer):
            task = {"do": "peer saved", "peer": one.name, "calibration": self.bench.options.calibration}
            return self._elsewhere(one, task, self._python(one))
        inputs = {role: self._input(name) for role, name in one.inputs.items()}
        if one.stage not in CONTROLS:
            return self.sealing.sealed(self._order(one, inputs))
        folders = {role: str(self.sealing.store.checkout(found)) for role, found in inputs.items()}
        folders["windows"] = str(self.bench.windows)
        params = bench.adapted(one, self.bench.options)
        return self._elsewhere(one, {"do": "run", "stage": one.stage, "params": params, "inputs": folders})

    def orders(self, name: str, model: str) -> list[Order]:
        """The steps that ask a checkpoint, in the order of `asks`."""
        made = []
        for what, params in self.asks.items():
            inputs = {"model": model, "text": self._asked_of(what)}
            if what == ABILITIES and model != self.bench.identities["dense"]:
                inputs["baseline"] = self.bench.identities["dense"]
            made.append(self.sealing.order(f"{name} {self.calibration} {what}", "validate", params, inputs))
        return made

    def _read(self, name: str, model: str) -> Reports:
        sealed = [self.sealing.sealed(order) for order in self.orders(name, model)]
        folders = [self.sealing.store.checkout(one) for one in sealed]
        texts = [(one / "report.json").read_text(encoding="utf-8") for one in folders]
        return dict(zip(self.asks, map(json.loads, texts), strict=True))

    def _measured(self, name: str, model: str | None) -> bool:
        """Whether all that is asked of a checkpoint is answered."""
        return bool(model) and all(self.sealing.holds(fingerprint(one.work)) for one in self.orders(name, str(model)))

    def _asked_of(self, what: str) -> str:
        return self.items if what == ABILITIES else self.bench.identities["other"]

    def _order(self, one: Technique, inputs: Mapping[str, str]) -> Order:
        params = bench.adapted(one, self.bench.options)
        return self.sealing.order(f"{one.name} {self.calibration}", one.stage, params, inputs)

    def _known(self, name: str) -> str | None:
        return self.bench.identities.get(name) or self.identity(self.techniques[name])

    def _input(self, name: str) -> str:
        if name in self.failed:
            raise StageError(f"needs {name}, which failed")
        return self.bench.identities.get(name) or self.made(self.techniques[name])

    def _elsewhere(self, one: Technique | Peer, task: Mapping[str, Any], python: str = sys.executable) -> str:
        """Have a child make a checkpoint in a folder, and bring it into the store."""
        record, folder = self._record(one), self._record(one).with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        task = {**task, **self._windows_of(), "output": str(folder)}
        bench.child(self.bench, f"{one.name} {self.calibration}", task, python)
        order = self.sealing.order(one.name, "fetch", {"source": folder.as_uri()}, {})
        record.write_text(str(order.params.model_dump()["digest"]), encoding="utf-8")
        found = self.sealing.sealed(order)
        shutil.rmtree(folder)
        return found

    def _fetch(self, one: Technique | Peer, digest: str) -> Order:
        source = self._record(one).with_suffix("").as_uri()
        return self.sealing.order(one.name, "fetch", {"source": source, "digest": digest}, {})

    def _asked_by(self, peer: Peer) -> Reports:
        """What a model answers that only its tool can execute: asked in the process that made it."""
        record = self._record(peer)
        if not record.is_file():
            texts = {what: str(self.sealing.store.checkout(self._asked_of(what))) for what in self.asks}
            asks = {
                what: {"params": params, "text": texts[what], "baseline": what == ABILITIES}
                for what, params in self.asks.items()
            }
            task = {"do": "peer asked", "peer": peer.name, "calibration": self.bench.options.calibration, "asks": asks}
            task |= {"python": self._python(peer), **self._windows_of()}
            found = bench.child(self.bench, f"{peer.name} {self.calibration}", task)["reports"]
            whole = record.with_suffix(".part")
            whole.write_text(json.dumps(found), encoding="utf-8")
            whole.replace(record)
        reports: Reports = json.loads(record.read_text(encoding="utf-8"))
        return reports

    def _record(self, one: Technique | Peer) -> Path:
        """Where it is kept what a control or a peer came to: named after all that it depends on."""
        told: dict[str, Any] = {"name": one.name, "bench": [digest_file(bench.HERE / name) for name in CODE]}
        told |= {
            "inputs": self.bench.identities,
            "options": [self.bench.options.tokens, self.bench.options.calibration],
        }
        if isinstance(one, Technique):
            told["params"] = bench.adapted(one, self.bench.options)
            told["code"] = code_digest("stages.models.checkpoint.loading")
        elif one.save is None:
            told |= {"asks": self.asks, "items": self.items, "python": self._python(one)}
            told["code"] = code_digest("stages.validate.stage")
        else:
            told["python"] = self._python(one)
        folder = self.bench.folder / "elsewhere"
        folder.mkdir(exist_ok=True, parents=True)
        return folder / f"{one.name.replace(':', '-')}-{digest_bytes(canonical(told))[:16]}.json"

    def _python(self, peer: Peer) -> str:
        return self.bench.interpreters.get(peer.distribution, sys.executable)

    def _windows_of(self) -> dict[str, str]:
        """What children read; the windows are cut when the first child asks."""
        folders = {name: str(self.bench.inputs[name]) for name in ("dense", "text", "other")}
        if not self.bench.windows.is_file():
            most = {"windows": 1, "tokens": self.bench.options.tokens, "calibration": None}
            whole = self.bench.windows.with_suffix(".part")
            bench.child(
                self.bench, f"windows {self.calibration}", {"do": "windows", **folders, **most, "path": str(whole)}
            )
            whole.replace(self.bench.windows)
        return {"dense": folders["dense"], "windows": str(self.bench.windows)}
