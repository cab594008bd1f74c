"""A sweep beside publications, in every order: nothing that a manifest names is lost."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.adapters.connect import connect
from stages.adapters.s3_client import client
from stages.adapters.s3_store import S3Objects
from stages.runtime.artifacts import ASIDE, PUBLISHING, Store, blob_key, entries
from stages.runtime.contract import Kind, Manifest, Provenance, Work
from stages.runtime.fingerprint import digest_bytes, fingerprint
from stages.runtime.stores import LocalObjects, Objects
from stages.runtime.sweep import newest, sweep
from tests.stages.adapters.conftest import s3_endpoint, s3_root  # noqa: F401
from tests.stages.runtime.interleaving import Paused, interleave, pause

OLD, NEW = b"stood long before", b"is new"


def drafted(folder: Path) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old").write_bytes(OLD)
    (folder / "new").write_bytes(NEW)
    work = Work(stage="trial", code="c", params={}, inputs={}, requires={})
    made = Provenance(step="s", host="h", device="d", created="2026", seconds=1, peak_rss_bytes=1)
    return Manifest(work=work, kind=Kind.CORPUS, files=entries(folder), metrics={}, provenance=made)


def meet(objects: Objects, folder: Path, drawn: random.Random, actor: Callable[[Objects], Objects]) -> None:
    """Publish, sweep and read at once: an old blob that nobody names is in the publication, and one may be killed."""
    manifest = drafted(folder / "draft")
    identity, key = fingerprint(manifest.work), blob_key(digest_bytes(OLD))
    objects.put(key, OLD)

    def store() -> Store:
        return Store(actor(objects), folder / "scratch")  # type: ignore[arg-type]

    dies = drawn.choice((None, 0, 1))
    sweeping = lambda: sweep(store(), older_than_s=-60)  # noqa: E731 - by its age all of it may go
    publishing, *_ = actors = interleave(
        drawn,
        lambda: store().publish(folder / "draft", manifest),
        sweeping,
        *([lambda: store().manifest(identity)] if drawn.random() < 0.5 else [sweeping]),
        may_die=dies,
    )
    plain = Store(objects, folder / "scratch")
    if not any(one.killed for one in actors):
        assert objects.read(key) == OLD and not list(objects.list(ASIDE)) and not list(objects.list(PUBLISHING))
    assert publishing.killed or objects.read(f"artifacts/{identity}.json")
    if plain.manifest(identity):
        plain.verify(identity)
        sweep(plain, older_than_s=-60)
        assert Store(objects, folder / "other").verify(identity).files.keys() == {"old", "new"}


def test_sweep_and_publication_in_any_order_lose_nothing_on_a_disk(tmp_path):
    for seed in range(300):
        folder = tmp_path / str(seed)
        meet(LocalObjects(folder / "store"), folder, random.Random(seed), Paused)


@pytest.mark.fault
def test_sweep_and_publication_in_any_order_lose_nothing_in_s3(s3_root, tmp_path):  # noqa: F811
    # Each request of the real client is a step: also those of which one move is made.
    events = client().meta.events
    events.register("before-call.s3", lambda **_: pause())
    for seed in range(60):
        meet(S3Objects(f"{s3_root}/{seed}"), tmp_path / str(seed), random.Random(seed), lambda objects: objects)


def move_keeps_bytes(objects: Objects) -> None:
    objects.put("a", b"1")
    objects.put("b", b"2")
    objects.move("a", "deep/c")
    assert (objects.read("a"), objects.read("deep/c")) == (None, b"1")
    objects.move("absent", "d")
    objects.move("deep/c", "b")
    assert [one.key for one in objects.list("")] == ["b"] and objects.read("b") == b"2"


def test_move_gives_another_key_and_replaces_nothing(tmp_path):
    move_keeps_bytes(LocalObjects(tmp_path))


def test_move_in_s3_is_as_on_a_disk_and_takes_a_large_object_in_parts(s3_root, monkeypatch):  # noqa: F811
    objects = S3Objects(s3_root)
    move_keeps_bytes(objects)
    from boto3.s3.transfer import TransferConfig

    monkeypatch.setattr("stages.adapters.s3_store._COPIES", TransferConfig(5 << 20, multipart_chunksize=5 << 20))
    data = os.urandom(11 << 20)
    objects.put("large", data)
    objects.move("large", "moved")
    assert objects.stat("large") is None and objects.read("moved") == data


def aged(folder: Path, hours: float = 25) -> None:
    then = time.time() - hours * 3600
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def test_dry_sweep_counts_what_a_sweep_takes_and_takes_nothing(tmp_path):
    store = connect(str(tmp_path / "store"))
    manifest = drafted(tmp_path / "draft")
    store.publish(tmp_path / "draft", manifest)
    store.objects.put(blob_key("e" * 64), b"12345")
    for name in ("blobs/aa/.put-x", "parts/w/0-1.json", "relays/r/000000.jsonl", "publishing/a.json"):
        store.objects.put(name, b"[]")
    for name in ("works/w.json", "shards/part.stderr", "logs/r/x.stderr", "drafts/d/x", "pins/p.json"):
        (store.scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (store.scratch / name).write_text("text")
    aged(store.objects.root)
    before = {path for path in store.objects.root.rglob("*") if path.is_file()}
    dry = sweep(store, dry=True)
    assert {path for path in store.objects.root.rglob("*") if path.is_file()} == before
    kinds = ("uploads", "parts", "relays", "announced", "blobs", "works", "shards", "logs", "drafts")
    assert dict(dry.counts) | {"uploads": 1} == dict.fromkeys(kinds, 1)
    assert sweep(store) == dry and sweep(store).counts.total() == 0
    store.verify(fingerprint(manifest.work))
    assert (store.scratch / "pins" / "p.json").exists()


def test_work_of_a_step_that_runs_and_relays_that_go_on_stay(tmp_path):
    store = connect(str(tmp_path / "store"))
    work = store.scratch / "works" / f"{'a' * 64}.json"
    work.parent.mkdir(parents=True)
    work.write_text("{}")
    for number in range(2):
        store.objects.put(f"relays/r/{number:06d}.jsonl", b"{}")
    aged(store.objects.root)
    with store.draft("a" * 64):
        store.objects.put("relays/r/000002.jsonl", b"{}")
        aged(store.scratch)
        assert sweep(store).counts.total() == 0
        assert work.exists() and len(list(store.objects.list("relays/"))) == 3
    aged(store.scratch)
    assert sweep(store).counts["works"] == 1 and not work.exists()
    assert newest(tmp_path / "gone") > time.time()
