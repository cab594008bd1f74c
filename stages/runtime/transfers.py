"""Moving an artifact's files: the bar that shows it, and going on with what an interrupted download left."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.runtime.contract import FileEntry, Progress, StageError
from stages.runtime.fingerprint import digest_file
from stages.runtime.stores import Moved, Objects, unheard

TOLD_BYTES = 100_000_000
"""What has to cross the network before a transfer has a bar of its own."""


def bar(progress: Progress | None, objects: Objects, note: str, sizes: Iterable[int]) -> Moved:
    """What hears bytes move: a bar, where enough of them cross the network to be waited for.

    Args:
        progress: who listens.
        objects: where the bytes come from or go to.
        note: what is said first; `{}` stands for the amount and for the place.
        sizes: bytes of each file; not asked for where nobody listens.
    """
    if progress is None or not objects.remote or (total := sum(sizes)) < TOLD_BYTES:
        return unheard
    progress.note(note.format(f"{total / 1e9:.1f} GB", objects.uri))
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # what is sent again, after damage or a lost race, is no progress
        progress.advanced(done, total)

    return moved


def bring(objects: Objects, key: str, identity: str, name: str, entry: FileEntry, into: Path, moved: Moved) -> None:
    """Bring an artifact's file into a folder unless it is there. What does not match `entry` is not kept.

    Raises:
        StageError: the bytes at `key` are not those of its digest.
    """
    target = into / name
    for _ in range(2):
        if target.is_file():
            moved(entry.size)
        else:
            objects.fetch(key, target, moved)
        found = digest_file(target)
        if found == entry.sha256:
            return
        # An interrupted download may have left damaged bytes: the second time every byte is fetched.
        target.unlink()
    raise StageError(
        f"{name} of artifact {identity[:12]} does not match its digest",
        measured=found[:12],
        limit=entry.sha256[:12],
        remedy=f"Remove it with `enginery sweep --artifact {identity[:12]}` and run again.",
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file against every other process and thread of this machine."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
