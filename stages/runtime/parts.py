"""Parts of one work: what was computed of it so far, in a run's own partial state and in a store that others add to.

A part is the bytes that a stage computed for the units `range(start, stop)` of its work. In a folder it stands as
`<start>-<stop>.json`; in a store as `parts/<identity>/<start>-<stop>.json`, with the work, the range and the digest of
its bytes, so that a part of other work or a damaged one is never used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.runtime.contract import PARTIAL, Progress
from stages.runtime.fingerprint import canonical, digest_bytes
from stages.runtime.stores import Objects

PARTS = "parts/"
FOLDER = f"{PARTIAL}/parts"
"""Where a stage finds and keeps its parts, below its output folder."""


def gaps(count: int, present: Iterable[range], size: int) -> list[range]:
    """What of `range(count)` lies in no range of `present`, in order, in ranges of at most `size` units."""
    have = {unit for span in present for unit in range(span.start, min(span.stop, count))}
    spans: list[range] = []
    for unit in range(count):
        if unit in have:
            continue
        if spans and spans[-1].stop == unit and len(spans[-1]) < size:
            spans[-1] = range(spans[-1].start, unit + 1)
        else:
            spans.append(range(unit, unit + 1))
    return spans


def keep(folder: Path, span: range, data: bytes) -> None:
    """Write a part into a folder; a crash at any moment leaves it whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(span)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_bytes(data)
    new.replace(path)


def kept(folder: Path) -> Iterator[tuple[range, bytes]]:
    """The parts in a folder, by their first unit."""
    found = [(span, path) for path in folder.glob("*.json") if (span := _span(path.name))]
    for span, path in sorted(found, key=lambda one: (one[0].start, one[0].stop)):
        yield span, path.read_bytes()


def put(objects: Objects, identity: str, span: range, data: bytes) -> None:
    """Add a part to the store. One that stands there is replaced only where it cannot be used."""
    key = f"{PARTS}{identity}/{_name(span)}"
    sealed = canonical(_header(identity, span, data) | {"part": data.decode()})
    if not objects.put(key, sealed) and read(objects, identity, span) is None:
        objects.put(key, sealed, replace=True)


def read(objects: Objects, identity: str, span: range) -> bytes | None:
    """A part's bytes, None where it is absent, damaged or of other work."""
    found = objects.read(f"{PARTS}{identity}/{_name(span)}")
    try:
        sealed = json.loads(found or b"")
        data = str(sealed.pop("part")).encode()
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return data if sealed == _header(identity, span, data) else None


def standing(objects: Objects, identity: str) -> list[range]:
    """The ranges whose parts stand in the store, by their names."""
    return [span for found in objects.list(f"{PARTS}{identity}/") if (span := _span(found.key.rpartition("/")[2]))]


def bring(objects: Objects, identity: str, draft: Path, progress: Progress) -> None:
    """Bring the store's parts of a work into its draft, apart from those that cannot be used."""
    for span in standing(objects, identity):
        data = read(objects, identity, span)
        if data is None:
            progress.note(f"part {_name(span)} in the store is damaged or of other work: it is computed again")
        else:
            keep(draft / FOLDER, span, data)


def drop(objects: Objects, identity: str) -> None:
    """Remove a work's parts from the store."""
    for found in list(objects.list(f"{PARTS}{identity}/")):
        objects.delete(found.key)


def _header(identity: str, span: range, data: bytes) -> dict[str, object]:
    return {"work": identity, "range": [span.start, span.stop], "sha256": digest_bytes(data)}


def _name(span: range) -> str:
    return f"{span.start}-{span.stop}.json"


def _span(name: str) -> range | None:
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})\.json", name)
    span = range(int(found[1]), int(found[2])) if found else range(0)
    return span or None
