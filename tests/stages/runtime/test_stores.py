"""Objects and the store over them: the same behaviour wherever they lie."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.runtime.artifacts import Store
from stages.runtime.contract import Kind, Manifest, Provenance, StageError, Work
from stages.runtime.fingerprint import entries, fingerprint
from stages.runtime.stores import LocalObjects, Objects


def keeps_objects(objects: Objects, tmp_path: Path) -> None:
    """What every kind of Objects must do; also asked of S3."""
    objects.probe()
    assert objects.stat("a/one") is None and objects.read("a/one") is None
    before = time.time()
    assert objects.put("a/one", b"first")
    assert not objects.put("a/one", b"second") and objects.read("a/one") == b"first"
    assert objects.put("a/one", b"third", replace=True) and objects.read("a/one") == b"third"
    found = objects.stat("a/one")
    assert found is not None and found.size == 5 and abs(found.modified - before) < 60
    file = tmp_path / "file"
    file.write_bytes(b"of a file")
    other = tmp_path / "other"
    other.write_bytes(b"of another")
    assert objects.put_file("a/two", file) and not objects.put_file("a/two", other)
    objects.fetch("a/two", tmp_path / "deep" / "fetched")
    assert (tmp_path / "deep" / "fetched").read_bytes() == b"of a file"
    assert objects.put("b", b"") and objects.read("b") == b""
    assert [(one.key, one.size) for one in objects.list("")] == [("a/one", 5), ("a/two", 9), ("b", 0)]
    assert [one.key for one in objects.list("a/")] == ["a/one", "a/two"]
    assert [one.key for one in objects.list("a/t")] == ["a/two"]
    assert list(objects.list("nothing/")) == []
    objects.move("a/one", "deep/moved")
    assert (objects.read("a/one"), objects.read("deep/moved")) == (None, b"third")
    objects.move("absent", "d")
    objects.move("deep/moved", "b")
    assert [one.key for one in objects.list("")] == ["a/two", "b"] and objects.read("b") == b""
    objects.delete("b")
    objects.delete("b")
    assert objects.stat("b") is None


def manifest_of(draft: Path, **params: object) -> Manifest:
    work = Work(stage="fetch", code="c", params=dict(params), inputs={}, requires={})
    provenance = Provenance(host="h", device="d", created="2026-01-01T00:00:00+00:00", seconds=1, peak_rss_bytes=1)
    return Manifest(work=work, kind=Kind.CHECKPOINT, files=entries(draft), metrics={}, provenance=provenance)


def publishes_and_notices_damage(store: Store, tmp_path: Path, damage: Callable[[str, bytes], None]) -> None:
    """Publish, check out, lose the race, find damaged bytes; also asked of S3."""
    draft = tmp_path / "draft"
    (draft / "inner").mkdir(parents=True)
    (draft / "a").write_bytes(b"alpha")
    (draft / "inner" / "b").write_bytes(b"beta" * 1000)
    manifest = manifest_of(draft, x=1)
    identity = fingerprint(manifest.work)
    assert store.manifest(identity) is None
    assert store.publish(draft, manifest) == manifest
    late = manifest.model_copy(update={"metrics": {"size_bytes": 1.0}})
    assert store.publish(draft, late) == manifest, "the first to seal wins"
    view = store.checkout(identity)
    assert (view / "a").read_bytes() == b"alpha" and (view / "inner" / "b").read_bytes() == b"beta" * 1000
    assert [name for name, _ in store.manifests()] == [identity]
    assert store.verify(identity) == manifest
    entry = manifest.files["a"]
    store.remove(identity)
    assert store.publish(draft, manifest) == manifest
    damage(f"blobs/{entry.sha256[:2]}/{entry.sha256}", b"omega")
    with pytest.raises(StageError, match=r"a of artifact .* does not match its digest"):
        store.checkout(identity)
    damage(f"blobs/{entry.sha256[:2]}/{entry.sha256}", b"short")
    damage(f"blobs/{entry.sha256[:2]}/{entry.sha256}", b"not so short")
    with pytest.raises(StageError, match=r"damaged.*12 bytes.*5 bytes"):
        store.manifest(identity)


def test_objects_on_a_disk_keep_what_is_put(tmp_path: Path) -> None:
    keeps_objects(LocalObjects(tmp_path / "objects"), tmp_path)


def test_store_on_a_disk_publishes_once_and_notices_damage(store: Store, tmp_path: Path) -> None:
    def damage(key: str, data: bytes) -> None:
        assert store.objects.put(key, data, replace=True)

    publishes_and_notices_damage(store, tmp_path, damage)


def test_put_raced_by_threads_is_won_by_exactly_one(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    for round_number in range(20):
        gate = threading.Barrier(8)

        def put(number: int, key: str = f"key-{round_number}", gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return objects.put(key, f"writer {number}".encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(put, range(8)))
        assert won.count(True) == 1
        assert objects.read(f"key-{round_number}") == f"writer {won.index(True)}".encode()
    assert len(list(tmp_path.iterdir())) == 20, "no temporary file is left"


def test_stored_object_cannot_be_written_through_the_draft_that_brought_it(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "objects")
    file = tmp_path / "file"
    file.write_bytes(b"sealed")
    objects.put_file("key", file)
    objects.put("other", b"sealed")
    for key in ("key", "other"):
        assert (tmp_path / "objects" / key).stat().st_mode & 0o777 == 0o444


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_files_from_another_file_system_are_copied_whole(tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if Path(elsewhere).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("one file system only")
        objects = LocalObjects(tmp_path / "objects")
        source = Path(elsewhere) / "file"
        source.write_bytes(b"far away" * 1000)
        assert objects.put_file("key", source)
        assert not objects.put_file("key", source)
        objects.fetch("key", Path(elsewhere) / "back")
        assert (Path(elsewhere) / "back").read_bytes() == b"far away" * 1000
        assert [one.key for one in objects.list("")] == ["key"]


def test_full_disk_while_linking_is_not_mistaken_for_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No disk can be filled here without filling everybody's: the one call that would fail is told to.
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    objects = LocalObjects(tmp_path / "objects")
    file = tmp_path / "file"
    file.write_bytes(b"data")
    objects.put("key", b"data")
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        objects.put_file("new", file)
    with pytest.raises(OSError, match="No space"):
        objects.fetch("key", tmp_path / "fetched")


def test_store_below_a_file_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match=r"cannot be written to.*--store"):
        LocalObjects(tmp_path / "file" / "store").probe()


def test_store_of_another_user_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    child = os.fork()
    if child == 0:  # permissions do not bind root, so the child becomes nobody
        code = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            LocalObjects(folder).probe()
        except StageError as error:
            code = 0 if "Permission denied" in str(error) and "--store" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
