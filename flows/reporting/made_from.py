"""From an engine back to the graph and the checkpoint that it was made from, through the manifests of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind, Manifest, StageError
from stages.runtime.fingerprint import digest_file
from stages.runtime.looking import looked_into

_MARKS = {"engine.json": Kind.ENGINE, "graph.json": Kind.ONNX, "config.json": Kind.CHECKPOINT}
_SOURCES = {Kind.ENGINE: "graph", Kind.ONNX: "model"}
"""Input of the work by which an artifact was made of the one before it."""


def kind_of(folder: Path) -> Kind:
    """What an artifact's folder holds.

    Raises:
        StageError: neither an engine nor a graph nor a checkpoint.
    """
    for name, kind in _MARKS.items():
        if (folder / name).is_file():
            return kind
    raise StageError(
        f"{folder.name} holds no engine, graph or checkpoint",
        measured=f"none of {', '.join(_MARKS)}",
        remedy="Give the folder of such an artifact.",
    )


@contextmanager
def made_from(folder: Path, wanted: Kind, store: Store) -> Iterator[Path]:
    """The artifact of a kind that a folder's own was made from, every byte hashed, as long as the block lasts.

    Args:
        folder: of an artifact; the store knows it by its bytes, wherever it lies.
        wanted: CHECKPOINT or ONNX.
        store: where it was made.

    Raises:
        StageError: it was made of no such artifact, or the store does not hold it.
    """
    manifest = _sealed(folder, store)
    while manifest.kind != wanted:
        role = _SOURCES.get(manifest.kind)
        source = manifest.work.inputs.get(role) if role else None
        if source is None:
            raise StageError(
                f"nothing that {folder.name} was made from is of the kind asked for",
                measured=f"it begins with a {manifest.kind}",
                limit=str(wanted),
                remedy="Name an artifact that is made of it: `enginery ls` shows what the store has.",
            )
        found = store.manifest(source)
        if found is None:
            raise _gone(folder, f"{source[:12]} is not in {store.uri}")
        manifest, identity = found, source
    with looked_into(store, identity) as (made, _):
        yield made


def _sealed(folder: Path, store: Store) -> Manifest:
    """The manifest of a folder's bytes."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    digests: dict[str, str] = {}
    for _, manifest in store.manifests():
        if {name: entry.size for name, entry in manifest.files.items()} != sizes:
            continue
        digests = digests or {name: digest_file(folder / name) for name in sizes}
        if all(entry.sha256 == digests[name] for name, entry in manifest.files.items()):
            return manifest
    raise _gone(folder, f"no artifact of these bytes in {store.uri}")


def _gone(folder: Path, measured: str) -> StageError:
    return StageError(
        f"what {folder.name} was made from is not there",
        measured=measured,
        remedy="Name the store in which it was made by --store, or name its checkpoint or graph itself.",
    )
