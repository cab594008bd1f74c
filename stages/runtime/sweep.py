"""What lies beside a store and in it, is old, and is of no use to anybody."""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.runtime.stores import Objects

DRAFTS, VIEWS = "drafts", "views"
_ROOMS = (DRAFTS, VIEWS, "downloads", "logs")


@dataclass(frozen=True)
class Swept:
    """What `Store.sweep` removed."""

    drafts: int
    blobs: int
    bytes: int
    uploads: int = 0


def old_work(scratch: Path, before: float, linked: Collection[str] = ()) -> tuple[int, int]:
    """Remove drafts, views, downloads and logs in which nothing is newer than `before`, and that nobody uses.

    Args:
        scratch: where they lie.
        before: seconds since the epoch.
        linked: rooms whose files are links to what stays.

    Returns:
        How many went, and the bytes that this freed.
    """
    count = freed = 0
    for room in _ROOMS:
        folder = scratch / room
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix != ".lock" and _newest(path) < before and not _in_use(path):
                count += 1
                freed += 0 if room in linked else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return count, freed


def unnamed(objects: Objects, rooms: Sequence[str], named: Collection[str], before: float) -> tuple[int, int]:
    """Remove what is older than `before` and whose key does not end in one of the names.

    Returns:
        How many objects went, and their bytes.
    """
    count = freed = 0
    for found in [one for room in rooms for one in objects.list(room)]:
        if found.key.rpartition("/")[2] not in named and found.modified < before:
            objects.delete(found.key)
            count, freed = count + 1, freed + found.size
    return count, freed


def _in_use(path: Path) -> bool:
    lock = path.parent / f"{path.name}.lock"
    if not lock.exists():
        return False
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _newest(path: Path) -> float:
    try:
        return max([path.stat().st_mtime, *(p.stat().st_mtime for p in path.rglob("*"))])
    except FileNotFoundError:
        return math.inf  # somebody works there
