"""Checkpoints below a prefix of a bucket or a folder: which are whole, and which have stopped changing.

A checkpoint is a folder with a configuration, a tokenizer and either one file of weights or an index with every shard
that it names; or a GGUF file by itself. It has stopped changing when two looks, some seconds apart, saw the same names,
sizes and times. What was seen is kept in the store, so that a look a minute, each in a container of its own, will do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TypeVar

from flows.triggers.arrival_records import ARRIVALS
from stages.adapters.connect import pins
from stages.adapters.sources import local_path
from stages.fetch import FetchParams, pin
from stages.models.checkpoint import layout
from stages.runtime.artifacts import Store
from stages.runtime.contract import Frozen, StageError, Unavailable
from stages.runtime.fingerprint import canonical, digest_bytes
from stages.runtime.progress import Silent
from stages.runtime.stores import LocalObjects, Objects, ObjectStat

T = TypeVar("T")


class Sighting(Frozen):
    """How a checkpoint was seen.

    Attributes:
        signature: of its files' names, sizes and times.
        since: when it was first seen so, seconds since the epoch.
        sizes: of its files.
        lacks: what is missing from it; empty when it is whole.
        digest: of its content, once it has stopped changing.
        refused: why it cannot be fetched.
    """

    signature: str
    since: float
    sizes: dict[str, int]
    lacks: str = ""
    digest: str = ""
    refused: str = ""

    @property
    def waits(self) -> bool:
        """Whether a later look may make an arrival of it without a change."""
        return not (self.lacks or self.digest or self.refused)


@dataclass(frozen=True)
class Prefix:
    """A place that is watched for a recipe."""

    uri: str
    recipe: str
    store: Store
    settle_s: float

    @property
    def memory(self) -> str:
        """The key of what was last seen there."""
        return f"{ARRIVALS}{self.recipe}/.seen-{digest_bytes(self.uri.encode())[:16]}.json"


def look(prefix: Prefix, say: Callable[[str], None]) -> dict[str, Sighting]:
    """What lies below a prefix now: source -> sighting. Those that stopped changing have a digest.

    Raises:
        StageError: the place is not there, or one may not read it.
        Unavailable: the server does not answer.
    """
    objects = _opened(prefix.uri)
    before, now = _recalled(prefix), time.time()
    seen = {source: _seen(files, objects, now, before.get(source)) for source, files in _found(objects)}
    _remember(prefix, seen, before)
    for source, one in seen.items():
        if one.lacks and before.get(source) != one:
            say(f"{source} is not whole yet: it lacks {one.lacks}")
        if one.waits and now - one.since >= prefix.settle_s and before.get(source) == one:
            kept = dict(seen)
            seen[source] = _pinned(source, one, prefix.store, say)
            _remember(prefix, seen, kept)
    return seen


def _opened(uri: str) -> Objects:
    if uri.startswith("s3://"):
        from stages.adapters.s3_store import S3Objects

        return S3Objects(uri)
    if "://" in uri and not uri.startswith("file://"):
        raise StageError(f"{uri} cannot be watched", limit="s3://bucket/prefix, a folder, or models:/NAME@ALIAS")
    root = local_path(uri)
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise StageError(f"{root} is no folder that can be read", remedy="Check the path and its permissions.")
    return LocalObjects(root)


def _found(objects: Objects) -> Iterator[tuple[str, dict[str, ObjectStat]]]:
    """Each possible checkpoint's source with its files, by their names."""
    folders: dict[str, dict[str, ObjectStat]] = {}
    pickles: dict[str, dict[str, ObjectStat]] = {}
    for one in _listed(objects):
        path = PurePosixPath(one.key)
        folder = "" if path.parent == PurePosixPath() else path.parent.as_posix()
        if path.suffix == ".gguf":
            yield _source(objects, one.key), {path.name: one}
        elif any(fnmatch(path.name, pattern) for pattern in layout.PATTERNS):
            folders.setdefault(folder, {})[path.name] = one
        elif path.name.endswith(layout.PICKLES):
            pickles.setdefault(folder, {})[path.name] = one
    for folder, files in folders.items():
        if any(name.endswith(".safetensors") or name == layout.INDEX for name in files):
            yield _source(objects, folder), files
        elif "config.json" in files and folder in pickles:  # said, and never whole
            yield _source(objects, folder), files | pickles[folder]


def _listed(objects: Objects) -> Iterator[ObjectStat]:
    """What lies there, in folders that are links as well; not in links below these, which may lead in circles."""
    yield from objects.list("")
    root = objects.root if isinstance(objects, LocalObjects) else None
    for link in sorted(root.rglob("*")) if root else ():
        if root and link.is_symlink() and link.is_dir():
            for one in LocalObjects(link).list(""):
                yield replace(one, key=f"{link.relative_to(root).as_posix()}/{one.key}")


def _source(objects: Objects, key: str) -> str:
    if isinstance(objects, LocalObjects):
        return Path(objects.root, key).as_uri()
    return f"{objects.uri}/{key}".rstrip("/")


def _seen(files: Mapping[str, ObjectStat], objects: Objects, now: float, before: Sighting | None) -> Sighting:
    signature = digest_bytes(canonical([[name, one.size, one.modified] for name, one in sorted(files.items())]))
    if before and before.signature == signature:
        return before
    sizes = {name: one.size for name, one in sorted(files.items())}
    return Sighting(signature=signature, since=now, sizes=sizes, lacks=_lacks(files, objects))


def _lacks(files: Mapping[str, ObjectStat], objects: Objects) -> str:
    """What a checkpoint of these files still needs before `fetch` would take it."""
    if any(name.endswith(".gguf") for name in files):
        return ""
    missing = [] if "config.json" in files else ["config.json"]
    if not any(all(name in files for name in names) for names in layout.TOKENIZERS):
        missing.append("its tokenizer")
    if layout.INDEX in files:
        missing += [name for name in _shards(objects.read(files[layout.INDEX].key)) if name not in files]
    elif layout.WEIGHTS not in files:
        pickles = [name for name in sorted(files) if name.endswith(layout.PICKLES)]
        instead = f" ({pickles[0]} is a pickle, which is not loaded)" if pickles else ""
        missing.append(f"{layout.WEIGHTS} or {layout.INDEX}{instead}")
    return ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")


def _shards(index: bytes | None) -> list[str]:
    try:
        names = set(json.loads(index or b"")["weight_map"].values())
        return sorted(str(name) for name in names) or ["a weight_map in its index"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ["a whole index"]


def _pinned(source: str, one: Sighting, store: Store, say: Callable[[str], None]) -> Sighting:
    try:
        found = pin(FetchParams(source=source), pins(store), Silent())
    except Unavailable as error:
        say(f"{source} could not be read, and will be tried again: {error}")
        return one
    except StageError as error:
        say(f"{source} cannot be fetched, and is left alone until it changes: {error}")
        return one.model_copy(update={"refused": str(error)})
    return one.model_copy(update={"digest": found.digest})


def _recalled(prefix: Prefix) -> dict[str, Sighting]:
    data = prefix.store.objects.read(prefix.memory)
    with suppress(ValueError, AttributeError):  # damaged, or another version's: it is looked at afresh
        return {source: Sighting.model_validate(one) for source, one in json.loads(data or b"{}").items()}
    return {}


def _remember(prefix: Prefix, seen: Mapping[str, Sighting], before: Mapping[str, Sighting]) -> None:
    if seen != before:
        data = canonical({source: one.model_dump(mode="json") for source, one in seen.items()})
        prefix.store.objects.put(prefix.memory, data, replace=True)
