"""A migrated MLflow database, made once a process and copied for each test, and made-up sealed artifacts."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from flows.tracking.connect import Tracking, open_tracking
from stages.runtime.contract import Kind, Manifest, Provenance, Work
from stages.runtime.fingerprint import entries, fingerprint


@cache
def migrated() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="migrated-"))
    atexit.register(shutil.rmtree, folder)
    open_tracking(folder, uri=f"sqlite:///{folder}/mlflow.db", experiment="other")
    return folder / "mlflow.db"


def tracking_in(folder: Path) -> Tracking:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(migrated(), folder / "mlflow.db")
    return open_tracking(folder, uri=f"sqlite:///{folder}/mlflow.db")


def sealed(store, files, stage="share", kind=Kind.CHECKPOINT, metrics=None, **params):
    """Publish an artifact of made-up bytes; returns its fingerprint and manifest."""
    store.scratch.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=store.scratch))
    for name, data in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_bytes(data)
    work = Work(stage=stage, code="c", params=params, inputs={}, requires={})
    made = Provenance(
        step=stage, host="h", device="d", created="2026-01-01T00:00:00+00:00", seconds=1.5, peak_rss_bytes=10**9
    )
    manifest = Manifest(work=work, kind=kind, files=entries(draft), metrics=metrics or {}, provenance=made)
    return fingerprint(work), store.publish(draft, manifest)
