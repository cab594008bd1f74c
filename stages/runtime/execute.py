"""Run one stage once: check, look for a hit, run into a draft, seal."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stages.runtime import parts
from stages.runtime.artifacts import Store, finish, finished
from stages.runtime.contract import (
    PARTIAL,
    DoesNotFit,
    Kind,
    Manifest,
    Params,
    Progress,
    Provenance,
    Stage,
    StageError,
    Work,
)
from stages.runtime.fingerprint import (
    ROOT,
    assert_installed,
    canonical,
    entries,
    fingerprint,
    first_difference,
    required,
    stage_digest,
)
from stages.runtime.peak_memory import peak_rss_bytes, reset_peak_rss
from stages.runtime.stores import LocalObjects


@dataclass(frozen=True)
class Outcome:
    """What `execute` came to."""

    identity: str
    manifest: Manifest
    cached: bool
    changed: bool
    """False when the sealed bytes are those that stood before: a hit, or a forced run that reproduced them."""


def work_of(stage: Stage[Any], params: Params, inputs: Mapping[str, str]) -> Work:
    """The identity of running `stage` with pinned `params` on inputs given as role -> fingerprint."""
    return Work(
        stage=stage.name,
        code=_code(stage, params),
        params=params.identity(),
        inputs=dict(sorted(inputs.items())),
        requires=required(stage.image) | required(stage.image_of(params)),
        executor=stage.executed_on(params) if stage.executed_on else {},
    )


def _code(stage: Stage[Any], params: Params) -> str:
    return stage_digest(stage.name, *(stage.uses(params) if stage.uses else ()))


def check_kinds(stage: Stage[Any], kinds: Mapping[str, Kind]) -> None:
    """Raise StageError unless the roles and artifact kinds are those that the stage takes."""
    for role, kind in kinds.items():
        accepted = stage.inputs.get(role.split(".")[0])
        if accepted is None or ("." in role) != accepted.many:
            raise StageError(f"{stage.name} has no input {role!r}", limit=", ".join(stage.inputs) or "no inputs")
        if kind not in accepted.kinds:
            raise StageError(
                f"{stage.name} cannot take this as {role!r}", measured=kind, limit=" or ".join(sorted(accepted.kinds))
            )
    for role, accepted in stage.inputs.items():
        if not accepted.optional and role not in {name.split(".")[0] for name in kinds}:
            raise StageError(f"{stage.name} needs an input {role!r}", limit=" or ".join(sorted(accepted.kinds)))


def execute(
    stage: Stage[Any],
    params: Params,
    work: Work,
    store: Store,
    progress: Progress,
    *,
    step: str = "",
    force: bool = False,
) -> Outcome:
    """Return the sealed artifact of `work`, making it if it is not there.

    Args:
        stage: the definition.
        params: pinned params whose identity stands in `work`.
        work: from `work_of`; its inputs must be sealed in `store`.
        store: where artifacts are read and sealed.
        progress: who listens.
        step: the name of this use in the recipe, for provenance.
        force: make it again although it is sealed.

    Raises:
        StageError: a broken contract; nothing was sealed.
        DoesNotFit: memory or disk ran out; nothing was sealed, partial state is kept.
    """
    identity = fingerprint(work)
    before = store.manifest(identity)
    if before and not force:
        return Outcome(identity, before, cached=True, changed=False)
    check(stage, params, work, store)
    check_executor(stage, params, work)
    with room(store), store.draft(identity) as draft:
        raced = store.manifest(identity)
        if raced and not force:
            store.discard(identity)
            return Outcome(identity, raced, cached=True, changed=False)
        _claim_partial(draft, work, fresh=force)
        manifest = finished(draft)
        if manifest is None:
            if stage.divided:
                parts.bring(store.objects, identity, draft, progress)
            manifest = _run(stage, params, work, store, progress, draft, step)
            if store.objects.remote:
                finish(draft, manifest)
        sealed = store.publish(draft, manifest, replace=force, progress=progress)
        store.discard(identity)
        if stage.divided:
            parts.drop(store.objects, identity)
    return Outcome(identity, sealed, cached=False, changed=before is None or before.files != sealed.files)


def checked_out(work: Work, store: Store, progress: Progress | None = None) -> dict[str, Path]:
    """Role -> folder of the input artifact."""
    return {role: store.checkout(identity, progress) for role, identity in work.inputs.items()}


def check(stage: Stage[Any], params: Params, work: Work, store: Store) -> None:
    """Raise StageError unless the inputs, the libraries and the code are those that the work names."""
    kinds: dict[str, Kind] = {}
    for role, identity in work.inputs.items():
        manifest = store.manifest(identity)
        if manifest is None:
            raise StageError(f"input {role!r} of {stage.name} is not sealed in {store.uri}", measured=identity[:12])
        kinds[role] = manifest.kind
    check_kinds(stage, kinds)
    assert_installed(work.requires)
    here = _code(stage, params)
    if here != work.code:
        raise StageError(
            f"the code of {stage.name} here is not the code that was planned",
            measured=here[:12],
            limit=work.code[:12],
            remedy="Build the image from the commit that plans the run.",
        )


def check_executor(stage: Stage[Any], params: Params, work: Work) -> None:
    """Raise StageError where the result would be a fact about another machine than the one that was planned."""
    here = stage.executed_on(params) if stage.executed_on else {}
    for name in sorted(here.keys() | work.executor.keys()):
        if here.get(name) != work.executor.get(name):
            raise StageError(
                f"{stage.name} was planned for another {name} than the one it runs on",
                measured=here.get(name),
                limit=work.executor.get(name),
                remedy="Name this pool's device under `devices` in the pools' settings ($ENGINERY_POOLS).",
            )


def _claim_partial(draft: Path, work: Work, *, fresh: bool) -> None:
    """Write the work beside the partial state, or refuse state of another work by the field that differs."""
    partial = draft / PARTIAL
    record = partial / "work.json"
    if fresh:
        shutil.rmtree(draft)
    if record.is_file():
        difference = first_difference(Work.model_validate_json(record.read_bytes()), work)
        if difference:
            raise StageError(
                f"the partial state in {partial} belongs to other work",
                measured=difference,
                remedy="Remove that folder to start this step afresh.",
            )
        return
    partial.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a kill or a full disk halfway would leave a record that no later run can read.
    whole = partial / ".work.json"
    whole.write_bytes(canonical(work.model_dump(mode="json")))
    whole.replace(record)


def _run(
    stage: Stage[Any], params: Params, work: Work, store: Store, progress: Progress, draft: Path, step: str
) -> Manifest:
    reset_peak_rss()
    started = time.monotonic()
    metrics = stage.run(params, checked_out(work, store, progress), draft, progress)
    files = entries(draft)
    if not files:
        raise StageError(f"{stage.name} ended without writing a file")
    return Manifest(
        work=work,
        kind=stage.output,
        files=files,
        metrics=metrics,
        provenance=Provenance(
            step=step,
            commit=commit(),
            image=os.environ.get("ENGINERY_IMAGE", ""),
            host=socket.gethostname(),
            device=device_name(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=peak_rss_bytes(),
        ),
    )


@contextmanager
def room(store: Store) -> Iterator[None]:
    """Say that memory or disk ran out wherever it shows: in the draft, in the stage, while sealing."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, MemoryError) as error:
        _raise_if_full(error, store)
        raise


def _raise_if_full(error: BaseException, store: Store) -> None:
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        raise DoesNotFit(
            "memory ran out",
            measured=f"peak {peak_rss_bytes() / 1e9:.1f} GB",
            remedy="Use a smaller model, fewer or shorter windows, or a larger machine.",
        ) from error
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in text:
        roots = [store.scratch, *([store.objects.root] if isinstance(store.objects, LocalObjects) else [])]
        place = min((r for r in roots if r.exists()), key=lambda root: shutil.disk_usage(root).free)
        raise DoesNotFit(
            f"the disk of {place} is full",
            measured=f"{shutil.disk_usage(place).free / 1e6:.0f} MB free",
            remedy="Free space there, run `enginery sweep`, or name another disk with --store.",
        ) from error


@cache
def commit() -> str:
    """The project's git commit, empty where it is not known."""
    if found := os.environ.get("ENGINERY_COMMIT"):
        return found
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
    )
    return done.stdout.strip()


@cache
def device_name() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x{os.cpu_count()}"
