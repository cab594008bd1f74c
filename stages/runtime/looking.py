"""An artifact's files for those who only look, and may have no right to write into the store or beside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.runtime.artifacts import Store, blob_key
from stages.runtime.contract import Manifest, StageError
from stages.runtime.stores import LocalObjects, unheard
from stages.runtime.transfers import bring


@contextmanager
def looked_into(store: Store, identity: str) -> Iterator[tuple[Path, Manifest]]:
    """A read-only folder with an artifact's files, every byte hashed, as long as the block lasts.

    The files of a store on this machine are linked to. What has to be brought from elsewhere goes into the store's
    scratch, where it is kept for the next look, or into a temporary folder where that may not be written to.

    Raises:
        StageError: not sealed, or a file's bytes differ from their digest.
    """
    manifest = store.manifest(identity)
    if manifest is None:
        raise StageError(f"artifact {identity[:12]} is not in {store.uri}", remedy="`enginery ls` shows what is.")
    if not isinstance(store.objects, LocalObjects) and _writable(store.scratch):
        yield store.checkout(identity), manifest
        return
    with tempfile.TemporaryDirectory(prefix="enginery-") as made:
        folder = Path(made)
        for name, entry in manifest.files.items():
            target, key = folder / name, blob_key(entry.sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(store.objects, LocalObjects):
                target.symlink_to(store.objects.root / key)
            bring(store.objects, key, identity, name, entry, folder, unheard)
        yield folder, manifest


def _writable(folder: Path) -> bool:
    """Whether a folder may be written to, or made."""
    stands = next(one for one in (folder, *folder.parents) if one.exists())
    return os.access(stands, os.W_OK | os.X_OK)
