"""A sweep beside publications, in every order: nothing that a manifest names is lost."""

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.adapters.connect import connect
from stages.adapters.s3.client import client
from stages.adapters.s3_store import S3Objects
from stages.runtime.artifacts import ASIDE, PUBLISHING, Store, blob_key
from stages.runtime.contract import Kind, Manifest, Provenance, Work
from stages.runtime.fingerprint import digest_bytes, entries, fingerprint
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


def meet(
    objects: Objects, folder: Path, order: list[tuple[int, int]], dies: int | None, asked: Callable[[Objects], Objects]
) -> None:
    """Publish (0), sweep (1, 2) and read (3) at once; an old blob that nobody names is in the publication."""
    manifest = drafted(folder / "draft")
    identity, key = fingerprint(manifest.work), blob_key(digest_bytes(OLD))
    objects.put(key, OLD)

    def store() -> Store:
        return Store(asked(objects), folder / "scratch")  # type: ignore[arg-type]

    actors = interleave(
        order,
        lambda: store().publish(folder / "draft", manifest),
        *[lambda: sweep(store(), older_than_s=-60)] * 2,  # by its age all of it may go
        lambda: store().manifest(identity),
        dies=dies,
    )
    if not any(one.killed for one in actors):
        assert objects.read(key) == OLD and not list(objects.list(ASIDE)) and not list(objects.list(PUBLISHING))
    assert actors[0].killed or objects.read(f"artifacts/{identity}.json")
    plain = Store(objects, folder / "scratch")
    if not plain.manifest(identity):
        return
    plain.verify(identity)
    objects.delete(f"artifacts/{identity}.json")  # as if only now it stood: the next sweep finds what is aside
    plain.publish(folder / "draft", manifest)
    sweep(plain, older_than_s=-60)
    assert Store(objects, folder / "other").verify(identity).files.keys() == {"old", "new"}


@pytest.mark.parametrize(
    "steps",
    [
        ((5, 6), (3, 9), (1, 2, 9)),
        pytest.param((range(10), range(1, 9), (1, 2, 3, 9)), marks=pytest.mark.fault),
    ],
    ids=["few", "all"],
)
def test_sweep_and_publication_in_any_order_lose_nothing_on_a_disk(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the power stays on
    for before, published, then, later, dies in itertools.product(*steps, (0, 1), (None, 0, 1)):
        order = [(1, before), (0, published), (1, then), (0, later), (3, 9 * later)]
        meet(LocalObjects(tmp_path / "store"), tmp_path, order, dies, Paused)
        shutil.rmtree(tmp_path / "store")


@pytest.mark.fault
def test_sweep_and_publication_in_any_order_lose_nothing_in_s3(s3_root, tmp_path):  # noqa: F811
    # Each request of the real client is a step: also those of which one move is made.
    client().meta.events.register("before-call.s3", lambda **_: pause())
    drawn = random.Random(0)
    for number in range(100):
        order = [(drawn.choice((0, 1, 1, 2, 3)), drawn.randrange(1, 9)) for _ in range(6)]
        objects, dies = S3Objects(f"{s3_root}/{number}"), drawn.choice((None, 0, 1))
        meet(objects, tmp_path / str(number), [(1, 8), *order], dies, lambda objects: objects)


@pytest.mark.fault
def test_second_sweep_while_the_first_moves_a_blob_in_s3_loses_nothing(s3_root, tmp_path):  # noqa: F811
    client().meta.events.register("before-call.s3", lambda **_: pause())
    for steps in range(4, 16):
        order = [(1, steps), (0, 99), (1, 3), (2, 99)]
        meet(S3Objects(f"{s3_root}/{steps}"), tmp_path / str(steps), order, None, lambda objects: objects)


def test_blob_that_a_killed_sweep_set_aside_comes_back_or_goes_once_old(store, tmp_path):
    manifest = drafted(tmp_path / "draft")
    store.publish(tmp_path / "draft", manifest)
    now, names = int(time.time()), {"named": digest_bytes(OLD), "young": "e" * 64, "old": "f" * 64}
    store.objects.move(blob_key(names["named"]), f"{ASIDE}{now - 90_000}-a-{names['named']}")
    store.objects.put(f"{ASIDE}{now}-a-{names['young']}", b"of another sweep")
    store.objects.put(f"{ASIDE}{now - 90_000}-a-{names['old']}", b"of nobody")
    sweep(store)
    assert store.objects.read(blob_key(names["named"])) == OLD
    assert [one.key[-64:] for one in store.objects.list(ASIDE)] == [names["young"]]


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
