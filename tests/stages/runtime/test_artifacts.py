import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.runtime import transfers
from stages.runtime.artifacts import PUBLISHING, RELAYS, Store
from stages.runtime.contract import PARTIAL, Kind, Manifest, Provenance, StageError, Work
from stages.runtime.fingerprint import digest_bytes, entries, fingerprint
from stages.runtime.progress import Silent
from stages.runtime.stores import LocalObjects, unheard
from stages.runtime.sweep import sweep

FILES = {"a.txt": b"alpha", "deep/b.bin": bytes(range(256)), "same.txt": b"alpha"}


def work(**fields):
    return Work(stage="trial", code="c", params={"n": 1}, inputs={}, requires={}).model_copy(update=fields)


def write(folder, files=FILES):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def sealed(store, files=FILES, *, step="one", created="2026-01-01", replace=False, **fields):
    made = work(**fields)
    with store.draft(fingerprint(made)) as draft:
        write(draft, files)
        provenance = Provenance(step=step, host="h", device="d", created=created, seconds=1, peak_rss_bytes=1)
        manifest = Manifest(work=made, kind=Kind.CORPUS, files=entries(draft), metrics={}, provenance=provenance)
        store.publish(draft, manifest, replace=replace)
        store.discard(fingerprint(made))
    return fingerprint(made)


def blob(store, data):
    return store.objects.root / "blobs" / digest_bytes(data)[:2] / digest_bytes(data)


def overwrite(path, data):
    path.chmod(0o644)
    path.write_bytes(data)


def aged(*paths, hours=25):
    then = time.time() - hours * 3600
    for path in paths:
        os.utime(path, (then, then))


def test_sealed_files_are_checked_out_as_they_were_drafted(store):
    identity = sealed(store)
    view = store.checkout(identity)
    assert {p.relative_to(view).as_posix(): p.read_bytes() for p in view.rglob("*") if p.is_file()} == FILES
    assert store.checkout(identity) == view
    assert store.verify(identity).files.keys() == FILES.keys()
    assert not (store.scratch / "drafts" / identity).exists()


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}x)?", fullmatch=True), st.binary(max_size=200), min_size=1)
)
def test_entries_of_any_files_are_their_digests_and_sizes(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("draft")
    kept = {name: data for name, data in files.items() if f"{name}/" not in " ".join(f"{n}" for n in files)}
    write(folder, kept)
    write(folder, {f"{PARTIAL}/state": b"x"})
    found = entries(folder)
    assert {name: (e.sha256, e.size) for name, e in found.items()} == {
        name: (digest_bytes(data), len(data)) for name, data in kept.items()
    }


def test_equal_files_are_stored_once_and_read_only(store):
    sealed(store)
    stored = [path for path in (store.objects.root / "blobs").rglob("*") if path.is_file()]
    assert len(stored) == 2
    assert all(path.stat().st_mode & 0o222 == 0 for path in stored)


@pytest.mark.parametrize("puts", [0, 1, 2])
def test_crash_anywhere_before_the_manifest_leaves_no_artifact_and_a_rerun_seals(store, puts):
    class Crash(Exception):
        pass

    class Crashing(LocalObjects):
        left = puts

        def _count(self):
            if self.left == 0:
                raise Crash
            self.left -= 1

        def put_file(self, key, path, moved=unheard):
            self._count()
            return super().put_file(key, path, moved)

        def put(self, key, data, *, replace=False):
            if key.startswith(PUBLISHING):
                return super().put(key, data, replace=replace)
            assert key.startswith("artifacts/")
            for file in FILES.values():
                assert blob(store, file).read_bytes() == file
            raise Crash

    identity = fingerprint(work())
    with pytest.raises(Crash):
        sealed(Store(Crashing(store.objects.root), store.scratch))
    assert store.manifest(identity) is None
    assert list(store.manifests()) == []
    with pytest.raises(StageError, match="is not in"):
        store.checkout(identity)
    assert sealed(store) == identity
    store.verify(identity)


def test_crash_at_the_manifest_leaves_no_artifact(store):
    class Crash(Exception):
        pass

    class Crashing(LocalObjects):
        def put(self, key, data, *, replace=False):
            if key.startswith(PUBLISHING):
                return super().put(key, data, replace=replace)
            assert all(blob(store, file).read_bytes() == file for file in FILES.values())
            raise Crash

    with pytest.raises(Crash):
        sealed(Store(Crashing(store.objects.root), store.scratch))
    assert list(store.manifests()) == []


def test_second_publisher_of_the_same_work_gets_the_first_ones_manifest(store):
    first = sealed(store, step="first")
    provenance = Provenance(step="second", host="h", device="d", created="now", seconds=1, peak_rss_bytes=1)
    with store.draft(first) as draft:
        write(draft, {"a.txt": b"other"})
        manifest = Manifest(work=work(), kind=Kind.CORPUS, files=entries(draft), metrics={}, provenance=provenance)
        assert store.publish(draft, manifest).provenance.step == "first"
        assert store.publish(draft, manifest, replace=True).provenance.step == "second"
    assert store.manifest(first).provenance.step == "second"


def test_a_blob_of_other_size_or_absent_is_found_by_reading_the_manifest(store):
    identity = sealed(store)
    overwrite(blob(store, b"alpha"), b"alph")
    with pytest.raises(StageError, match=r"a\.txt .* is damaged") as caught:
        store.manifest(identity)
    assert (caught.value.measured, caught.value.limit) == ("4 bytes", "5 bytes")
    blob(store, b"alpha").unlink()
    with pytest.raises(StageError, match="damaged") as caught:
        store.manifest(identity)
    assert caught.value.measured == "absent"


def test_a_changed_byte_is_found_when_a_stage_consumes_it(store):
    identity = sealed(store)
    overwrite(blob(store, b"alpha"), b"alphb")
    assert store.manifest(identity) is not None
    for _ in range(2):
        with pytest.raises(StageError, match=r"a\.txt .* does not match its digest"):
            store.checkout(identity)
    with pytest.raises(StageError, match="does not match"):
        store.verify(identity)


@pytest.mark.parametrize("written", [b"other", b"alph", None])
def test_a_view_that_was_written_into_is_made_anew_from_what_is_sealed(store, written):
    identity = sealed(store)
    view = store.checkout(identity)
    (view / "a.txt").unlink()
    if written:
        (view / "a.txt").write_bytes(written)
    assert (store.checkout(identity) / "a.txt").read_bytes() == b"alpha"
    assert {path.name for path in view.rglob("*") if path.is_file()} == {name.split("/")[-1] for name in FILES}


@pytest.mark.parametrize("damage", [b"alphb", b"alph"])
def test_remove_takes_damaged_blobs_along_so_that_a_rerun_heals(store, damage):
    identity = sealed(store)
    overwrite(blob(store, b"alpha"), damage)
    store.remove(identity)
    assert store.manifest(identity) is None
    assert not blob(store, b"alpha").exists()
    assert blob(store, FILES["deep/b.bin"]).exists()
    assert sealed(store) == identity
    store.verify(identity)


def test_remove_of_what_is_absent_or_lost_its_blobs_is_fine(store):
    store.remove("f" * 64)
    identity = sealed(store)
    blob(store, b"alpha").unlink()
    store.remove(identity)
    assert list(store.manifests()) == []


def test_an_unreadable_manifest_is_refused_with_a_remedy(store):
    identity = sealed(store)
    overwrite(store.objects.root / "artifacts" / f"{identity}.json", b'{"work": 1}')
    with pytest.raises(StageError, match="cannot be read") as caught:
        store.manifest(identity)
    assert f"enginery sweep --artifact {identity[:12]}" in caught.value.remedy


@pytest.mark.parametrize("left", [b"", b'{"work": {"stage": "pru'])
def test_an_unreadable_manifest_hides_no_other_artifact_and_can_be_taken_away(store, left):
    whole, broken = sealed(store), sealed(store, code="d")
    overwrite(store.objects.root / "artifacts" / f"{broken}.json", left)
    told = []
    assert [identity for identity, _ in store.manifests(unread=told.append)] == [whole]
    assert [broken[:12] in str(one) for one in told] == [True]
    assert store.resolve(broken[:12]) == broken
    assert (store.whole(whole), store.whole(broken)) == (True, False)
    # What it names is not known: nothing may go for want of a name.
    aged(*(path for path in (store.objects.root / "blobs").rglob("*") if path.is_file()))
    with pytest.raises(StageError, match="cannot be read"):
        sweep(store)
    store.verify(whole)
    store.remove(broken)
    assert sealed(store, code="d") == broken
    store.verify(broken)


@pytest.mark.parametrize("damage", [b"alphb", b"alph", None])
def test_an_artifact_is_whole_while_every_byte_is_as_it_was_sealed(store, damage):
    identity = sealed(store)
    assert store.whole(identity)
    blob(store, b"alpha").unlink() if damage is None else overwrite(blob(store, b"alpha"), damage)
    assert not store.whole(identity)
    assert not store.whole("f" * 64)


def test_resolve_finds_the_one_artifact_of_a_prefix(store):
    first, second = sealed(store), sealed(store, code="d")
    assert store.resolve(first[:12]) == first
    assert store.resolve(second) == second
    with pytest.raises(StageError, match="no artifact begins with 'zz'"):
        store.resolve("zz")
    with pytest.raises(StageError, match="more than one") as caught:
        store.resolve("")
    assert caught.value.measured == 2


def test_draft_keeps_partial_state_and_drops_the_rest(store):
    identity = "a" * 64
    with store.draft(identity) as draft:
        write(draft, {"half.bin": b"1", "deep/half": b"2", f"{PARTIAL}/state": b"3", f"{PARTIAL}/deep/x": b"4"})
    left = [p.relative_to(draft).as_posix() for p in draft.rglob("*") if p.is_file()]
    assert sorted(left) == [f"{PARTIAL}/deep/x", f"{PARTIAL}/state"]
    write(draft, {"killed.bin": b"5", "deep/killed": b"6"})
    with store.draft(identity) as draft:
        assert [path.name for path in draft.iterdir()] == [PARTIAL]


def test_draft_is_held_by_one_at_a_time(store):
    order = []

    def second():
        with store.draft("a" * 64):
            order.append("second")

    with store.draft("a" * 64):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        with store.draft("b" * 64):
            order.append("other work")
        order.append("first")
    thread.join()
    assert order == ["other work", "first", "second"]


def test_sweep_takes_old_drafts_and_unreferenced_blobs_and_nothing_else(store):
    identity = sealed(store)
    other = sealed(store, {"lost.txt": b"lost", "a.txt": b"alpha"}, code="d")
    store.remove(other)
    with store.draft("e" * 64) as old:
        write(old, {f"{PARTIAL}/state": b"12345"})
    with store.draft("f" * 64) as young:
        write(young, {f"{PARTIAL}/state": b"1"})
    aged(*(path for path in [*(store.objects.root / "blobs").rglob("*"), *old.rglob("*"), old]))
    swept = sweep(store)
    assert (swept.counts["drafts"], swept.counts["blobs"], swept.bytes) == (1, 1, 9)
    assert not old.exists()
    assert young.exists()
    assert not blob(store, b"lost").exists()
    store.verify(identity)
    assert sweep(store).counts["blobs"] == 0


def test_sweep_takes_old_relays_and_logs_and_spares_young_ones(store):
    for name in ("old", "young"):
        store.objects.put(f"{RELAYS}{name}/000000.jsonl", b"{}")
        log = store.scratch / "logs" / name / "step.stderr"
        log.parent.mkdir(parents=True)
        log.write_text("words")
    relays, logs = store.objects.root / RELAYS, store.scratch / "logs"
    aged(*(relays / "old").rglob("*"), *(logs / "old").rglob("*"), logs / "old")
    swept = sweep(store)
    assert (swept.counts["relays"], swept.counts["logs"], swept.bytes) == (1, 1, 7)
    assert (relays / "young" / "000000.jsonl").exists() and not (relays / "old" / "000000.jsonl").exists()
    assert (logs / "young").exists() and not (logs / "old").exists()


def test_sweep_spares_young_blobs_that_no_manifest_names_yet(store):
    store.remove(sealed(store))
    assert sweep(store).counts["blobs"] == 0
    assert sweep(store, older_than_s=-1).counts["blobs"] == 2


def test_sweep_spares_a_draft_in_use_and_a_view_lately_asked_for(store):
    identity = sealed(store)
    view = store.checkout(identity)
    with store.draft("e" * 64) as draft:
        write(draft, {"a": b"1"})
        aged(draft, draft / "a", view, *view.rglob("*"))
        store.checkout(identity)
        assert sweep(store).counts.total() == 0
        assert draft.is_dir()
        assert view.is_dir()
    aged(draft, view, *view.rglob("*"))
    swept = sweep(store)
    assert (swept.counts["drafts"], swept.counts["views"]) == (1, 1)
    store.verify(identity)


def test_a_blob_that_a_new_publication_reuses_is_young_again(store):
    store.remove(sealed(store))
    aged(blob(store, b"alpha"))
    with store.draft("e" * 64) as draft:
        write(draft, {"a.txt": b"alpha"})
        store.objects.put_file(f"blobs/{digest_bytes(b'alpha')[:2]}/{digest_bytes(b'alpha')}", draft / "a.txt")
    assert sweep(store).counts["blobs"] == 0


def test_nearest_names_the_first_field_that_differs_from_the_most_similar_of_the_step(store):
    assert store.nearest(work(), "one") == "nothing like it is sealed yet"
    sealed(store, params={"n": 1, "m": 1}, inputs={"model": "a"}, step="one")
    sealed(store, params={"n": 1, "m": 2}, inputs={"model": "b"}, step="one", created="2026-01-02")
    sealed(store, params={"n": 1, "m": 3}, inputs={"model": "a"}, step="two")
    wanted = work(params={"n": 1, "m": 3}, inputs={"model": "b"})
    assert store.nearest(wanted, "one") == "params.m: 2 -> 3"
    assert store.nearest(wanted, "two") == "inputs.model: a -> b"
    assert store.nearest(work(stage="other"), "one") == "nothing like it is sealed yet"


def test_checkout_goes_on_with_what_a_killed_one_left_and_keeps_nothing_foreign(store):
    identity = sealed(store)
    building = store.scratch / "views" / f".view-{identity}"
    write(building, {"a.txt": b"cut s", "deep/b.bin": FILES["deep/b.bin"], "deep/b.bin.0123abcd.part": b"1", "x": b"y"})
    blob(store, FILES["deep/b.bin"]).rename(store.scratch / "away")
    store.manifest = lambda _: Manifest.model_validate_json(
        (store.objects.root / "artifacts" / f"{identity}.json").read_bytes()
    )
    view = store.checkout(identity)
    assert {p.relative_to(view).as_posix(): p.read_bytes() for p in view.rglob("*") if p.is_file()} == FILES
    assert not building.exists()


def test_checkouts_at_once_build_one_view(store):
    identity = sealed(store)
    gate = threading.Barrier(8)

    def checkout(_):
        gate.wait()
        return store.checkout(identity)

    with ThreadPoolExecutor(8) as pool:
        views = set(pool.map(checkout, range(8)))
    assert views == {store.scratch / "views" / identity}
    assert [path for path in (store.scratch / "views").iterdir() if path.is_dir()] == [*views]


def test_sweep_spares_a_view_that_is_being_built(store):
    identity = sealed(store)
    building = store.scratch / "views" / f".view-{identity}"

    class Sweeping(LocalObjects):
        def fetch(self, key, path, moved=unheard):
            super().fetch(key, path, moved)
            aged(building, *building.rglob("*"))
            assert sweep(store).counts["views"] == 0

    Store(Sweeping(store.objects.root), store.scratch).checkout(identity)
    write(building, {"a.txt": b"left by a kill"})
    aged(building, *building.rglob("*"))
    assert sweep(store).counts["views"] >= 1
    assert not building.exists()


def test_a_blob_that_was_swept_while_the_others_travelled_is_put_again(store):
    store.remove(sealed(store, {"a.txt": b"alpha"}))

    class Swept(LocalObjects):
        def put(self, key, data, *, replace=False):
            if key.startswith("artifacts/"):
                blob(store, b"alpha").unlink()
            return super().put(key, data, replace=replace)

    identity = sealed(Store(Swept(store.objects.root), store.scratch), {"a.txt": b"alpha", "b.txt": b"beta"})
    store.verify(identity)


def test_temporary_files_of_killed_puts_are_swept_once_old(store):
    identity = sealed(store)
    left = {"artifacts/.put-old": b"1", "blobs/aa/.put-old": b"22", "blobs/aa/.put-young": b"333", "b/.put-old": b"4"}
    write(store.objects.root, left)
    aged(*(store.objects.root / name for name in left if name.endswith("old")))
    swept = sweep(store)
    assert (swept.counts["uploads"], swept.counts["blobs"], swept.bytes) == (2, 0, 3)
    assert [name for name in left if (store.objects.root / name).exists()] == ["blobs/aa/.put-young", "b/.put-old"]
    store.verify(identity)


def test_a_local_store_says_nothing_of_its_transfers(store, monkeypatch):
    class Loud(Silent):
        def note(self, text):
            raise AssertionError(text)

        def advanced(self, done, total):
            raise AssertionError(done)

    monkeypatch.setattr(transfers, "TOLD_BYTES", 0)
    with store.draft("a" * 64) as draft:
        write(draft)
        provenance = Provenance(step="one", host="h", device="d", created="now", seconds=1, peak_rss_bytes=1)
        manifest = Manifest(work=work(), kind=Kind.CORPUS, files=entries(draft), metrics={}, provenance=provenance)
        store.publish(draft, manifest, progress=Loud())
    assert store.checkout(fingerprint(work()), Loud()).is_dir()
