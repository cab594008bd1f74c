"""Where sealed bytes live: keyed objects on a disk. Others of the same face are `stages/adapters/*_store.py`."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.runtime.contract import StageError

_PUTTING = ".put-"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK)


@dataclass(frozen=True)
class ObjectStat:
    """One stored object: key, bytes, seconds since the epoch of its last change."""

    key: str
    size: int
    modified: float


Moved = Callable[[int], None]
"""Told how many more bytes are where they go; bytes that an interrupted transfer left there count too."""


def unheard(_count: int) -> None:
    """Let bytes move without telling anybody."""


class Objects(Protocol):
    """Keyed bytes with put-if-absent. A put object is durable and whole, or it is not there."""

    uri: str
    remote: bool
    """Whether bytes cross a network; otherwise the URI names a folder here, where a run's scratch lies too."""

    def probe(self, *, writing: bool = True) -> None:
        """Raise StageError when one may not write here, or conditional put does not work.

        Without `writing` nothing is written: StageError says that there is no store here, or none that one may read.
        """

    def stat(self, key: str) -> ObjectStat | None:
        """Size and age of an object, None when absent."""

    def read(self, key: str) -> bytes | None:
        """A small object's bytes, None when absent."""

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """Store bytes; False when the key stood already and `replace` is not asked."""

    def put_file(self, key: str, path: Path, moved: Moved = unheard) -> bool:
        """Store a file's bytes if absent; False when the key stood already. The key must name the content."""

    def fetch(self, key: str, path: Path, moved: Moved = unheard) -> None:
        """Bring an object to a local path that does not exist yet; it must not be written to."""

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """Every object whose key begins with `prefix`, in key order."""

    def move(self, key: str, to: str) -> None:
        """Give an object another key, whatever its size; where that stands, or this one is absent, it is as deleted."""

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""

    def sweep_uploads(self, prefix: str, *, older_than_s: float, dry: bool = False) -> tuple[int, int]:
        """Remove what interrupted puts left below `prefix`, or with `dry` look only; returns how many, and bytes."""


class LocalObjects:
    """Objects as files below a folder. Publication is `os.link`, which fails if the name stands."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = self.root.as_uri()

    def probe(self, *, writing: bool = True) -> None:
        """See Objects. One file is written and is gone at once.

        Raises:
            StageError: the folder cannot be made or written to; without `writing`: it is absent or cannot be read.
        """
        if not writing:
            self._look()
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StageError(
                f"the store {self.root} cannot be written to ({error.strerror})",
                remedy="Name another with --store or $ENGINERY_STORE, or change the folder's permissions.",
            ) from error

    def stat(self, key: str) -> ObjectStat | None:
        """See Objects."""
        try:
            found = self._path(key).stat()
        except FileNotFoundError:
            return None
        return ObjectStat(key, found.st_size, found.st_mtime)

    def read(self, key: str) -> bytes | None:
        """See Objects."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """See Objects."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PUTTING)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                os.fchmod(stream.fileno(), 0o444)
            if replace:
                Path(name).replace(path)
                name = ""
                return True
            return self._link(Path(name), path)
        finally:
            if name:
                Path(name).unlink(missing_ok=True)
            _sync_folder(path.parent)

    def put_file(self, key: str, path: Path, moved: Moved = unheard) -> bool:
        """See Objects. The file becomes read-only and may share its blocks with the store."""
        target = self._path(key)
        if target.exists():
            # Young again, or `sweep` could take it before the manifest that is about to name it.
            with suppress(PermissionError):
                os.utime(target)
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), 0o444)
            os.utime(stream.fileno())
        try:
            return self._link(path, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_PUTTING)
        try:
            with os.fdopen(handle, "wb") as out, path.open("rb") as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
                os.fchmod(out.fileno(), 0o444)
            return self._link(Path(name), target)
        finally:
            Path(name).unlink(missing_ok=True)

    def fetch(self, key: str, path: Path, moved: Moved = unheard) -> None:
        """See Objects. Links where the disk allows, else copies."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self._path(key)
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copyfile(source, path)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """See Objects."""
        folder = self.root / prefix.rpartition("/")[0]
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix):
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            if not path.is_dir():
                yield ObjectStat(key, found.st_size, found.st_mtime)

    def move(self, key: str, to: str) -> None:
        """See Objects. A link first, so that the bytes have a name at every moment."""
        source, target = self._path(key), self._path(to)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except FileNotFoundError:
            return
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            source.rename(target)  # another user's file may be renamed where it may not be linked
        _sync_folder(target.parent)
        source.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        """See Objects."""
        self._path(key).unlink(missing_ok=True)

    def sweep_uploads(self, prefix: str, *, older_than_s: float, dry: bool = False) -> tuple[int, int]:
        """See Objects. They are the temporary files of processes that were killed."""
        before, count, freed = time.time() - older_than_s, 0, 0
        for found in list(self.list(prefix)):
            if found.key.rpartition("/")[2].startswith(_PUTTING) and found.modified < before:
                if not dry:
                    self.delete(found.key)
                count, freed = count + 1, freed + found.size
        return count, freed

    def _look(self) -> None:
        if not self.root.is_dir():
            raise StageError(
                f"there is no store at {self.root}",
                remedy="Name the one that a run has made with --store or $ENGINERY_STORE.",
            )
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise StageError(
                f"the store {self.root} cannot be read",
                remedy="Change the folder's permissions, or name another with --store or $ENGINERY_STORE.",
            )

    def _path(self, key: str) -> Path:
        return self.root / key

    def _link(self, source: Path, target: Path) -> bool:
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        _sync_folder(target.parent)
        return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
