"""A store's URI to the store, and what a run on this machine keeps beside it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical
from stages.runtime.stores import LocalObjects, Objects


def default_store() -> str:
    """$ENGINERY_STORE, or ~/.enginery/store."""
    return os.environ.get("ENGINERY_STORE") or str(Path.home() / ".enginery" / "store")


def connect(uri: str, scratch: Path | None = None) -> Store:
    """Open a store.

    Args:
        uri: a folder, a file:// URI or s3://bucket/prefix.
        scratch: folder for drafts, views and downloads; by default `state` inside a local store, or below
            $ENGINERY_HOME (~/.enginery) for a remote one.

    Raises:
        StageError: the scheme is unknown, or one may not write there.
    """
    parts = urlsplit(uri)
    objects: Objects
    if parts.scheme in ("", "file"):
        root = Path(unquote(parts.path) if parts.scheme else uri).expanduser().absolute()
        objects = LocalObjects(root)
        scratch = scratch or root / "state"
    elif parts.scheme == "s3":
        from stages.adapters.s3 import S3Objects

        objects = S3Objects(uri)
        home = Path(os.environ.get("ENGINERY_HOME") or Path.home() / ".enginery")
        scratch = scratch or home / "scratch" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    else:
        raise StageError(f"no store speaks {parts.scheme}://", limit="a folder, file:// or s3://")
    objects.probe()
    return Store(objects, scratch)


class FilePins:
    """Resolved sources and their downloads, below a store's scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.downloads = scratch / "downloads"
        self._known = scratch / "pins"

    def recall(self, source: str) -> str | None:
        """See Pins."""
        path = self._path(source)
        return json.loads(path.read_text(encoding="utf-8"))["digest"] if path.is_file() else None

    def remember(self, source: str, digest: str) -> None:
        """See Pins."""
        path = self._path(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}")
        whole.write_bytes(canonical({"source": source, "digest": digest}))
        whole.replace(path)

    def _path(self, source: str) -> Path:
        return self._known / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"


def pins(store: Store) -> FilePins:
    """The pins kept beside a store."""
    return FilePins(store.scratch)
