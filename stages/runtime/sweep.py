"""What lies beside a store and in it, is old, and is of no use to anybody.

A sweep and a publication may meet at any moment, and nothing that a manifest names may be lost by it. A publication
announces the digests first, puts the blobs, puts the manifest, and puts back what is missing. A sweep looks who is
named or announced, sets the other blobs aside, looks once more, and only then deletes them or puts them back. Whoever
announced before that second look is seen by it; whoever announced later finds the blob gone and puts it.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from stages.runtime.artifacts import ASIDE, BLOBS, DRAFTS, MANIFESTS, PUBLISHING, RELAYS, VIEWS, Store, blob_key
from stages.runtime.contract import StageError
from stages.runtime.parts import PARTS
from stages.runtime.stores import ObjectStat

KEPT_SECONDS = 24 * 3600
"""How old an unreferenced blob or a draft must be before a sweep takes it: longer than any publication lasts."""
WORKS = "works"
_ROOMS = (DRAFTS, VIEWS, "downloads", "logs", WORKS, "shards")
_AT_ONCE = 100
"""Blobs that are aside at a time: a reader has to wait for no more than these."""


@dataclass(frozen=True)
class Swept:
    """What a sweep removed, or would: how many of each kind, and their bytes."""

    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, size: int, count: int = 1) -> None:
        """Count what goes."""
        self.counts[kind] += count
        self.sizes[kind] += size

    @property
    def bytes(self) -> int:
        """Of all kinds."""
        return self.sizes.total()


def sweep(store: Store, *, older_than_s: float = KEPT_SECONDS, dry: bool = False) -> Swept:
    """Remove what is older than `older_than_s` and of no use.

    Beside the store: drafts, views, downloads, logs, works, shards. In it: blobs that nothing names, interrupted
    uploads, parts, relays.

    Args:
        store: it and its scratch.
        older_than_s: the age from which on a thing that nobody uses goes.
        dry: remove nothing, and count what would go.
    """
    before, swept = time.time() - older_than_s, Swept()
    _beside(store, before, swept, dry)
    for prefix in (MANIFESTS, BLOBS, ASIDE):
        count, size = store.objects.sweep_uploads(prefix, older_than_s=older_than_s, dry=dry)
        swept.add("uploads", size, count)
    if not dry:
        _go_on_with_aside(store)
    announced = min(before, time.time() - KEPT_SECONDS)
    for kind, room, limit in (
        ("parts", PARTS, before),
        ("relays", RELAYS, before),
        ("announced", PUBLISHING, announced),
    ):
        for group in _groups(store, room):
            # Together or not at all: a relay's first lines are read again by a run that goes on with it.
            if max(one.modified for one in group) < limit:
                for one in group:
                    swept.add(kind, one.size)
                    if not dry:
                        store.objects.delete(one.key)
    _blobs(store, before, swept, dry)
    return swept


def newest(path: Path) -> float:
    """When something last changed in a folder or file, in seconds since the epoch."""
    try:
        return max([path.lstat().st_mtime, *(p.lstat().st_mtime for p in path.rglob("*"))])
    except FileNotFoundError:
        return math.inf  # somebody works there


def taken(path: Path, *, dry: bool, linked: bool = False) -> int:
    """Remove a folder or file; returns the bytes that this frees, none where its files are links to what stays."""
    freed = 0
    with suppress(FileNotFoundError):  # another sweep is at it
        files = [path, *path.rglob("*")] if not linked else []
        freed = sum(one.lstat().st_size for one in files if one.is_file())
        if not dry:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


def _beside(store: Store, before: float, swept: Swept, dry: bool) -> None:
    for room in _ROOMS:
        folder = store.scratch / room
        # Files of views are links to the blobs themselves, unless these lie elsewhere.
        linked = room == VIEWS and not store.objects.remote
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            lock = store.scratch / (DRAFTS if room == WORKS else room) / f"{path.name.removesuffix('.json')}.lock"
            if path.suffix != ".lock" and newest(path) < before:
                with _held(lock, dry=dry) as free:
                    if free and newest(path) < before:
                        swept.add(room, taken(path, dry=dry, linked=linked))


def _groups(store: Store, room: str) -> Iterator[list[ObjectStat]]:
    found: dict[str, list[ObjectStat]] = {}
    for one in store.objects.list(room):
        found.setdefault(one.key.removeprefix(room).partition("/")[0], []).append(one)
    yield from found.values()


def _blobs(store: Store, before: float, swept: Swept, dry: bool) -> None:
    """Blobs that no manifest names and no publication has announced, in two looks."""
    old = [one for one in store.objects.list(BLOBS) if one.modified < before and not _name(one).startswith(".")]
    named = _named(store)
    unnamed = [one for one in old if _name(one) not in named]
    aside = f"{ASIDE}{int(time.time())}-{uuid.uuid4().hex[:8]}-"
    for start in range(0, len(unnamed), _AT_ONCE):
        batch = unnamed[start : start + _AT_ONCE]
        for one in batch if not dry else ():
            store.objects.move(one.key, aside + _name(one))
        named = set() if dry else _named(store)
        for one in batch:
            if _name(one) in named:
                store.objects.move(aside + _name(one), one.key)
                continue
            swept.add("blobs", one.size)
            if not dry:
                store.objects.delete(aside + _name(one))


def _go_on_with_aside(store: Store) -> None:
    """Put back, or delete, what a sweep that was killed had set aside; one that goes on now is not disturbed."""
    found = list(store.objects.list(ASIDE))
    named = _named(store) if found else set()
    for one in found:
        lost = _name(one) in named and store.objects.stat(blob_key(_name(one))) is None
        if lost:
            store.objects.move(one.key, blob_key(_name(one)))
        elif time.time() - _began(one) > KEPT_SECONDS:
            store.objects.delete(one.key)


def _named(store: Store) -> set[str]:
    """The digests that somebody needs: those of every manifest, and those of manifests that are about to stand."""
    named = set()
    # Announcements first: one that is gone by the second look has left its manifest to be seen there.
    for one in list(store.objects.list(PUBLISHING)):
        if time.time() - one.modified < KEPT_SECONDS:
            named.update(json.loads(store.objects.read(one.key) or b"[]"))
    # One that was replaced within the resolution of its time would look like the one before.
    for _, manifest in store.manifests(unsettled_s=60, unread=_refuse):
        named.update(entry.sha256 for entry in manifest.files.values())
    return named


def _refuse(unread: StageError) -> None:
    """What a manifest that cannot be read names is not known, so that nothing may go."""
    raise unread


def _name(one: ObjectStat) -> str:
    """The digest that a blob's key ends in, also while it is aside."""
    return one.key.rpartition("-" if one.key.startswith(ASIDE) else "/")[2]


def _began(one: ObjectStat) -> float:
    stamp = one.key.removeprefix(ASIDE).partition("-")[0]
    return float(stamp) if stamp.isdigit() else one.modified


@contextmanager
def _held(lock: Path, *, dry: bool) -> Iterator[bool]:
    """Whether nobody holds a lock file; for the block nobody takes it."""
    if not lock.exists():
        yield True
        return
    with lock.open("r" if dry else "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
