"""A store's URI to the store, and what a run on this machine keeps beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical
from stages.runtime.stores import LocalObjects, Objects


def default_store() -> str:
    """$ENGINERY_STORE, or ~/.enginery/store."""
    return os.environ.get("ENGINERY_STORE") or str(Path.home() / ".enginery" / "store")


def connect(uri: str, scratch: Path | None = None, *, reading: bool = False) -> Store:
    """Open a store.

    Args:
        uri: a folder, a file:// URI, or the URI of a store of `stages/adapters`, such as s3://bucket/prefix.
        scratch: folder for drafts, views and downloads; by default `state` inside a store on this machine, or below
            $ENGINERY_HOME (~/.enginery) for a remote one.
        reading: only look: nothing is made or written, and a store that is not there is an error.

    Raises:
        StageError: the scheme is unknown, or one may not write there; with `reading`: there is none, or one may not
            read it.
    """
    objects = _objects(uri)
    if scratch is None and objects.remote:
        home = Path(os.environ.get("ENGINERY_HOME") or Path.home() / ".enginery")
        scratch = home / "scratch" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    objects.probe(writing=not reading)
    return Store(objects, scratch or Path(unquote(urlsplit(objects.uri).path)) / "state", reading=reading)


def _objects(uri: str) -> Objects:
    """What `open_store` of the file named after the URI's scheme opens; a folder needs none."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return LocalObjects(Path(unquote(parts.path) if parts.scheme else uri).expanduser().absolute())
    module = f"stages.adapters.{parts.scheme}_store"
    # A scheme may hold dots, which would name a module elsewhere.
    if not re.fullmatch("[a-z0-9]+", parts.scheme) or find_spec(module) is None:
        known = sorted(f"{path.stem.removesuffix('_store')}://" for path in Path(__file__).parent.glob("*_store.py"))
        *most, last = ["file://", *known]
        raise StageError(f"no store speaks {parts.scheme}://", limit=f"a folder, {', '.join(most)} or {last}")
    found: Objects = import_module(module).open_store(uri)
    return found


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
