"""The store of sealed artifacts: content-addressed blobs, manifests written last, views to read them from."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.runtime.contract import PARTIAL, FileEntry, Manifest, Progress, StageError, Work
from stages.runtime.fingerprint import canonical, differing_fields, digest_file, entries, fingerprint, first_difference
from stages.runtime.stores import Objects, ObjectStat
from stages.runtime.transfers import bar, bring, locked

MANIFESTS = "artifacts/"
BLOBS = "blobs/"
RELAYS = "relays/"
"""What stages in containers say, until the run that waits for them has heard it."""
PUBLISHING = "publishing/"
"""The digests that a manifest is about to name, so that no sweep takes their blobs before it stands."""
ASIDE = "aside/"
"""Blobs on their way out: a sweep empties it only after it has looked once more whether somebody names them."""
DRAFTS, VIEWS = "drafts", "views"
_FINISHED = "finished.json"


class Store:
    """Sealed artifacts in `objects`; drafts and views in `scratch`, a folder on this machine.

    With `reading` nothing is written into `objects`.
    """

    def __init__(self, objects: Objects, scratch: Path, *, reading: bool = False) -> None:
        self.objects = objects
        self.scratch = scratch
        self.reading = reading
        self.uri = objects.uri
        # A plan asks for every manifest once a step, and each is a request to a remote store.
        self._read: dict[str, tuple[tuple[int, float], Manifest]] = {}

    def manifest(self, identity: str) -> Manifest | None:
        """The manifest of a fingerprint, None when it is not sealed. Sizes of its blobs are checked, bytes are not.

        Raises:
            StageError: the manifest cannot be read, or a blob is missing or has another size.
        """
        data = self.objects.read(f"{MANIFESTS}{identity}.json")
        if data is None:
            return None
        manifest = self._parsed(identity, data)
        for name, entry in manifest.files.items():
            found = self.objects.stat(blob_key(entry.sha256)) or self._brought_back(entry.sha256)
            if found is None or found.size != entry.size:
                raise StageError(
                    f"{name} of artifact {identity[:12]} is damaged in {self.uri}",
                    measured="absent" if found is None else f"{found.size} bytes",
                    limit=f"{entry.size} bytes",
                    remedy=f"Remove the artifact with `enginery sweep --artifact {identity[:12]}` and run again.",
                )
        return manifest

    def manifests(
        self, *, unsettled_s: float = 0.0, unread: Callable[[StageError], None] | None = None
    ) -> Iterator[tuple[str, Manifest]]:
        """Every sealed artifact: fingerprint and manifest. What is younger than `unsettled_s` is read anew.

        Of a manifest that cannot be read `unread` is told; without it that is passed over: the others are as good.
        """
        for identity, found in self._listed():
            state = (found.size, found.modified)
            if self._read.get(identity, (None,))[0] != state or time.time() - found.modified < unsettled_s:
                data = self.objects.read(found.key)
                if data is None:
                    continue
                try:
                    self._read[identity] = (state, self._parsed(identity, data))
                except StageError as error:
                    if unread:
                        unread(error)
                    continue
            yield identity, self._read[identity][1]

    def _listed(self) -> Iterator[tuple[str, ObjectStat]]:
        for found in self.objects.list(MANIFESTS):
            name = found.key.removeprefix(MANIFESTS)
            if name.endswith(".json") and not name.startswith("."):
                yield name.removesuffix(".json"), found

    def resolve(self, prefix: str) -> str:
        """The one fingerprint that begins with `prefix`.

        Raises:
            StageError: none or several do.
        """
        names = [name for name, _ in self._listed() if name.startswith(prefix)]
        if len(names) != 1:
            raise StageError(
                f"{'no artifact' if not names else 'more than one artifact'} begins with {prefix!r}",
                measured=len(names),
                limit=1,
                remedy="`enginery ls` shows the artifacts of this store.",
            )
        return names[0]

    def publish(
        self, draft: Path, manifest: Manifest, *, replace: bool = False, progress: Progress | None = None
    ) -> Manifest:
        """Seal a draft: each file to its digest, then the manifest if absent. Returns the manifest that stands."""
        identity = fingerprint(manifest.work)
        sizes = {entry.sha256: entry.size for entry in manifest.files.values()}
        announced = f"{PUBLISHING}{identity}-{uuid.uuid4().hex[:8]}.json"
        self.objects.put(announced, canonical(sorted(sizes)))
        absent = (size for digest, size in sizes.items() if not self.objects.stat(blob_key(digest)))
        moved = bar(progress, self.objects, "uploading {} to {}", absent)
        for name, entry in manifest.files.items():
            self.objects.put_file(blob_key(entry.sha256), draft / name, moved)
        data = manifest.model_dump_json(indent=1).encode()
        stands: Manifest | None = manifest
        if self.objects.put(f"{MANIFESTS}{identity}.json", data, replace=replace):
            for name, entry in manifest.files.items():
                # A sweep that had looked before all this was announced may have taken what stood already.
                if self.objects.stat(blob_key(entry.sha256)) is None:
                    self.objects.put_file(blob_key(entry.sha256), draft / name)
        else:
            stands = self.manifest(identity)
        self.objects.delete(announced)
        if stands is None:
            raise StageError(f"the manifest of {identity[:12]} vanished while it was published", remedy="Run again.")
        return stands

    def checkout(self, identity: str, progress: Progress | None = None) -> Path:
        """A read-only folder with the artifact's files, every byte hashed against the manifest.

        What a killed checkout brought is kept and gone on with. A folder in which something was changed is made anew.

        Raises:
            StageError: not sealed, or a sealed file's bytes differ from their digest.
        """
        manifest = self.manifest(identity)
        if manifest is None:
            raise StageError(f"artifact {identity[:12]} is not in {self.uri}", remedy="Run the step that makes it.")
        view = self.scratch / VIEWS / identity
        if view.is_dir():
            os.utime(view)  # `sweep` takes views that nobody asked for lately.
        if not self._matches(view, manifest):
            self._build(view, manifest, identity, progress)
        return view

    def verify(self, identity: str) -> Manifest:
        """Hash every byte of an artifact; returns its manifest. Raises StageError naming the file that differs."""
        self.checkout(identity)
        manifest = self.manifest(identity)
        assert manifest is not None
        return manifest

    def _brought_back(self, digest: str) -> ObjectStat | None:
        """A blob that a sweep has just set aside, or one that was killed then, in its place again."""
        if self.reading:
            return None
        for found in [one for one in self.objects.list(ASIDE) if one.key.endswith(f"-{digest}")]:
            self.objects.move(found.key, blob_key(digest))
        return self.objects.stat(blob_key(digest))

    def whole(self, identity: str) -> bool:
        """Whether an artifact is sealed and every byte of it is as its manifest says."""
        known = self._known(identity)
        return known is not None and not any(self._damaged(one) for one in known.files.values())

    def _damaged(self, entry: FileEntry) -> bool:
        found = self.objects.stat(blob_key(entry.sha256))
        if found is None or found.size != entry.size:
            return True
        with tempfile.TemporaryDirectory(dir=self.scratch if os.access(self.scratch, os.W_OK) else None) as folder:
            self.objects.fetch(blob_key(entry.sha256), Path(folder) / "blob")
            return digest_file(Path(folder) / "blob") != entry.sha256

    def _build(self, view: Path, manifest: Manifest, identity: str, progress: Progress | None) -> None:
        """Bring an artifact's files into a folder of one name, so that another process can go on with it."""
        building = view.with_name(f".view-{identity}")
        view.parent.mkdir(parents=True, exist_ok=True)
        with locked(building.with_name(f"{building.name}.lock")):
            if self._matches(view, manifest):  # made by another while this one waited
                return
            shutil.rmtree(view, ignore_errors=True)  # the store's bytes decide, not those of a copy
            building.mkdir(exist_ok=True)
            sizes = (entry.size for entry in manifest.files.values())
            moved = bar(progress, self.objects, "downloading {} from {}", sizes)
            for name, entry in manifest.files.items():
                bring(self.objects, blob_key(entry.sha256), identity, name, entry, building, moved)
            for path in sorted(building.rglob("*")):
                if path.is_file() and path.relative_to(building).as_posix() not in manifest.files:
                    path.unlink()
            building.rename(view)

    def _matches(self, view: Path, manifest: Manifest) -> bool:
        return view.is_dir() and all(
            (view / name).is_file() and digest_file(view / name) == entry.sha256
            for name, entry in manifest.files.items()
        )

    @contextmanager
    def draft(self, identity: str) -> Iterator[Path]:
        """The folder in which one process may make this artifact; what stands in its `PARTIAL` is kept.

        Yields:
            A folder that is otherwise empty, unless it was finished and not published. It is removed after
            publication by the caller's `discard`.
        """
        folder = self.scratch / DRAFTS / identity
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f"{identity}.lock"):
            folder.mkdir(exist_ok=True)
            _clear(folder)
            try:
                yield folder
            finally:
                # What a failed stage wrote is of no use; left here it would keep a full disk full.
                _clear(folder)

    def discard(self, identity: str) -> None:
        """Remove a draft whose artifact is sealed."""
        shutil.rmtree(self.scratch / DRAFTS / identity, ignore_errors=True)

    def nearest(self, work: Work, step: str) -> str:
        """Why `work` is not sealed: the first field in which the nearest sealed artifact of the step differs."""
        best: tuple[tuple[int, int, str], str] | None = None
        for _, manifest in self.manifests():
            if manifest.work.stage != work.stage:
                continue
            differing = differing_fields(manifest.work, work)
            rank = (int(manifest.provenance.step != step), differing, manifest.provenance.created)
            if best is None or rank < best[0]:
                best = (rank, first_difference(manifest.work, work))
        return best[1] if best else "nothing like it is sealed yet"

    def remove(self, identity: str) -> None:
        """Take an artifact's manifest away, and its damaged blobs; whole ones go with the next sweep.

        A damaged blob has to go at once: sealing puts a blob only if it is absent, so it would come back.
        """
        known = self._known(identity)
        self.objects.delete(f"{MANIFESTS}{identity}.json")
        for entry in known.files.values() if known else ():
            if self._damaged(entry):
                self.objects.delete(blob_key(entry.sha256))
        shutil.rmtree(self.scratch / VIEWS / identity, ignore_errors=True)

    def _known(self, identity: str) -> Manifest | None:
        if data := self.objects.read(f"{MANIFESTS}{identity}.json"):
            with suppress(StageError):
                return self._parsed(identity, data)
        return None

    def _parsed(self, identity: str, data: bytes) -> Manifest:
        try:
            return Manifest.model_validate_json(data)
        except ValueError as error:
            raise StageError(
                f"the manifest of {identity[:12]} in {self.uri} cannot be read",
                remedy="It is damaged, or another version's: `enginery sweep --artifact "
                f"{identity[:12]}` takes it away, and its step makes it anew.",
            ) from error


def finished(draft: Path) -> Manifest | None:
    """The manifest of a draft that was whole when its publication broke off, if its bytes are what they were."""
    record = draft / PARTIAL / _FINISHED
    if not record.is_file():
        return None
    with suppress(ValueError):  # a machine that lost power may leave a record without its bytes
        manifest = Manifest.model_validate_json(record.read_bytes())
        if entries(draft) == manifest.files:
            return manifest
    record.unlink()
    _clear(draft)
    return None


def finish(draft: Path, manifest: Manifest) -> None:
    """Keep a whole draft until it is published: a server that goes away must not cost the work that made it."""
    whole = draft / PARTIAL / f".{_FINISHED}"
    whole.write_text(manifest.model_dump_json(), encoding="utf-8")
    whole.replace(draft / PARTIAL / _FINISHED)


def _clear(draft: Path) -> None:
    if (draft / PARTIAL / _FINISHED).is_file():
        return
    for path in draft.iterdir() if draft.is_dir() else ():
        if path.name != PARTIAL:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def blob_key(digest: str) -> str:
    """Where the bytes of a digest lie."""
    return f"{BLOBS}{digest[:2]}/{digest}"
