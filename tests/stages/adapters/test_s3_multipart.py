"""Transfers that break off and go on, against a real server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from stages.adapters.connect import connect
from stages.adapters.s3 import client as s3_client
from stages.adapters.s3 import multipart as s3_multipart
from stages.adapters.s3.client import client, parse
from stages.adapters.s3_store import S3Objects
from stages.runtime import patience, transfers
from stages.runtime.contract import PARTIAL, Unavailable
from stages.runtime.execute import Outcome, execute, work_of
from stages.runtime.fingerprint import digest_bytes, fingerprint
from stages.runtime.progress import Silent
from stages.runtime.sweep import sweep
from tests.services.killing import kill_at, random_file, there_and_back
from tests.services.transfer import Heard
from tests.stages.adapters.relay import Relay
from tests.stages.runtime.test_stores import manifest_of
from tests.stages.runtime.trial import TRIAL, TrialParams

pytestmark = pytest.mark.fault  # a real server, cut off and killed again and again

PART = 5 << 20
Through = Callable[[str], None]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_multipart, "PART_BYTES", PART)


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch, s3_root: str) -> Through:
    """Go on as a new process would, by another endpoint."""

    def use(endpoint: str, tries: int = 1) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setattr(s3_client, "_TRIES", tries)
        monkeypatch.setattr(patience, "_of_process_s", 0.0)
        client.cache_clear()

    return use


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(6 * PART + 17))
    return path


def uploads(root: str, key: str) -> list[dict[int, int]]:
    """Part number -> bytes, of each upload of a key that is under way."""
    bucket, prefix = parse(root)
    where = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
    found = []
    for one in client().list_multipart_uploads(Bucket=bucket, Prefix=where["Key"]).get("Uploads", []):
        parts = client().list_parts(**where, UploadId=one["UploadId"]).get("Parts", [])
        found.append({part["PartNumber"]: part["Size"] for part in parts})
    return found


def begin(root: str, key: str, parts: dict[int, bytes]) -> str:
    """An upload with some parts, as an interrupted process leaves it."""
    bucket, prefix = parse(root)
    where = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
    upload = str(client().create_multipart_upload(**where)["UploadId"])
    for number, data in parts.items():
        client().upload_part(**where, UploadId=upload, PartNumber=number, Body=data)
    return upload


def part_of(file: Path, number: int) -> bytes:
    return file.read_bytes()[(number - 1) * PART : number * PART]


def test_artifact_survives_kills_on_both_ways_and_moves_no_byte_twice(
    s3_root: str, s3_endpoint: str, tmp_path: Path, through: Through
) -> None:
    size = 10 * PART
    random_file(tmp_path / "draft" / "weights", size, os.urandom(1 << 20))
    with Relay(s3_endpoint, bytes_per_s=40e6) as relay:
        # Slow enough for a kill to hit the middle.
        os.environ["AWS_ENDPOINT_URL"] = relay.url  # the fixture `through` puts it back
        up, down = there_and_back(s3_root, tmp_path, PART, kill_at(0.3, size))
    assert 0.3 * size <= up.kept < size and up.took["sent"] == size - up.kept
    assert 0.3 * size <= down.kept < size and down.took["got"] == size - down.kept


def test_upload_whose_server_goes_away_is_unavailable_and_goes_on_later(
    s3_root: str, s3_endpoint: str, file: Path, tmp_path: Path, through: Through
) -> None:
    with Relay(s3_endpoint, until_bytes=3.5 * PART) as relay:
        through(relay.url)
        with pytest.raises(Unavailable, match=r"no server answers for s3://.*/key"):
            S3Objects(s3_root).put_file("key", file)
    through(s3_endpoint)
    kept = sum(uploads(s3_root, "key")[0].values())
    assert PART <= kept <= 3 * PART
    moved: list[int] = []
    with Relay(s3_endpoint) as relay:
        through(relay.url)
        assert S3Objects(s3_root).put_file("key", file, moved.append)
    assert relay.sent < file.stat().st_size - kept + 100_000
    assert sum(moved) == file.stat().st_size
    through(s3_endpoint)
    S3Objects(s3_root).fetch("key", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert uploads(s3_root, "key") == []


def test_stage_whose_artifact_did_not_get_through_is_published_later_and_not_run_again(
    s3_root: str, s3_endpoint: str, tmp_path: Path, through: Through
) -> None:
    params = TrialParams(kilobytes=6 * PART // 1000, log=str(tmp_path / "log"))
    work = work_of(TRIAL, params, {})

    def run(*, force: bool = False) -> Outcome:
        return execute(TRIAL, params, work, connect(s3_root, tmp_path / "scratch"), Silent(), force=force)

    def runs() -> int:
        return len((tmp_path / "log").read_text().splitlines())

    def cut_off(*, force: bool = False) -> None:
        with Relay(s3_endpoint, until_bytes=0.5 * PART) as relay:
            through(relay.url)
            with pytest.raises(Unavailable):
                run(force=force)
        through(s3_endpoint)

    draft = tmp_path / "scratch" / "drafts" / fingerprint(work)
    cut_off()
    cut_off()
    assert runs() == 1
    (draft / "text.txt").write_bytes(b"damaged")
    cut_off()
    assert runs() == 2, "bytes that are not what they were are made again"
    cut_off(force=True)
    assert runs() == 3
    (draft / PARTIAL / "finished.json").write_bytes(b"")
    cut_off()
    assert runs() == 4
    outcome = run()
    assert runs() == 4 and not outcome.cached and not draft.exists()
    assert connect(s3_root, tmp_path / "scratch").verify(outcome.identity) == outcome.manifest


def test_download_whose_server_goes_away_is_unavailable_and_goes_on_later(
    s3_root: str, s3_endpoint: str, file: Path, tmp_path: Path, through: Through
) -> None:
    S3Objects(s3_root).put_file("key", file)
    with Relay(s3_endpoint, until_bytes=3.5 * PART) as relay:
        through(relay.url)
        with pytest.raises(Unavailable, match=r"no server answers for s3://.*/key"):
            S3Objects(s3_root).fetch("key", tmp_path / "back")
    kept = sum(path.stat().st_size for path in tmp_path.glob("back.*.part"))
    assert kept > 2 * PART
    moved: list[int] = []
    with Relay(s3_endpoint) as relay:
        through(relay.url)
        S3Objects(s3_root).fetch("key", tmp_path / "back", moved.append)
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert relay.answered < file.stat().st_size - kept + 100_000
    assert sum(moved) == file.stat().st_size


@pytest.mark.parametrize("begun", [False, True])
def test_writers_of_one_key_at_once_leave_the_whole_file(s3_root: str, file: Path, tmp_path: Path, begun: bool) -> None:
    gate = threading.Barrier(4)
    if begun:
        begin(s3_root, "key", {2: part_of(file, 2)})

    def put(_: int) -> bool:
        gate.wait()
        return S3Objects(s3_root).put_file("key", file)

    with ThreadPoolExecutor(4) as pool:
        assert any(list(pool.map(put, range(4))))
    S3Objects(s3_root).fetch("key", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stands", [True, False])
def test_upload_that_another_ends_is_lost_where_the_object_stands_and_else_begun_anew(
    s3_root: str, file: Path, tmp_path: Path, stands: bool
) -> None:
    bucket, prefix = parse(s3_root)
    objects, upload = S3Objects(s3_root), begin(s3_root, "key", {1: part_of(file, 1)})

    moved = []

    def end(count: int) -> None:
        moved.append(count)
        client().abort_multipart_upload(Bucket=bucket, Key=f"{prefix}/key", UploadId=upload)
        if stands:
            objects.put("key", b"of another")

    assert objects.put_file("key", file, end) is not stands
    assert not stands or sum(moved) <= file.stat().st_size, "nothing is sent for an object that stands"
    assert objects.read("key") == (b"of another" if stands else file.read_bytes())


def test_parts_that_are_not_of_the_file_are_sent_again(s3_root: str, file: Path) -> None:
    begin(s3_root, "key", {1: os.urandom(PART), 2: os.urandom(PART + 1), 3: part_of(file, 4), 9: os.urandom(100)})
    assert S3Objects(s3_root).put_file("key", file)
    assert S3Objects(s3_root).read("key") == file.read_bytes()


def test_parts_whose_etag_is_no_md5_are_sent_again(
    s3_root: str, s3_endpoint: str, file: Path, through: Through
) -> None:
    def as_with_kms(parsed: dict[str, Any], **_: object) -> None:
        for part in parsed.get("Parts", []):
            part["ETag"] = f'"{digest_bytes(part["ETag"].encode())[:32]}"'

    begin(s3_root, "key", {1: part_of(file, 1), 2: part_of(file, 2)})
    with Relay(s3_endpoint) as relay:
        through(relay.url)
        client().meta.events.register("after-call.s3.ListParts", as_with_kms)
        assert S3Objects(s3_root).put_file("key", file)
    assert relay.sent > file.stat().st_size
    through(s3_endpoint)
    assert S3Objects(s3_root).read("key") == file.read_bytes()


@pytest.mark.parametrize("always", [False, True])
def test_part_that_another_replaced_before_the_end_is_sent_in_an_upload_of_its_own(
    s3_root: str, file: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    answers: list[str] = []

    def replaced(parsed: dict[str, Any], **_: object) -> None:
        answers.append(parsed["ETag"])
        if always or len(answers) == 1:
            parsed["ETag"] = f'"{digest_bytes(b"of another")[:32]}"'

    monkeypatch.setattr(s3_multipart, "_TRIES", 2)
    client().meta.events.register("after-call.s3.UploadPart", replaced)
    if always:
        with pytest.raises(Unavailable, match="ended by another"):
            S3Objects(s3_root).put_file("key", file)
        assert S3Objects(s3_root).stat("key") is None
    else:
        assert S3Objects(s3_root).put_file("key", file)
        assert S3Objects(s3_root).read("key") == file.read_bytes()


@pytest.mark.parametrize(("conflicts", "placed"), [(2, True), (99, None)])
def test_write_in_conflict_is_asked_again_and_at_last_unavailable(conflicts: int, placed: bool | None) -> None:
    left = iter(range(conflicts))

    def put() -> None:
        if next(left, None) is not None:
            answer = {"Error": {"Code": "ConditionalRequestConflict"}, "ResponseMetadata": {"HTTPStatusCode": 409}}
            raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    if placed:
        assert s3_multipart.if_absent("s3://bucket/key", put)
    else:
        with pytest.raises(Unavailable, match="changed by another"), s3_client.spoken("s3://bucket/key"):
            s3_multipart.if_absent("s3://bucket/key", put)


def test_uploads_of_longer_keys_are_not_gone_on_with(s3_root: str, file: Path) -> None:
    begin(s3_root, "key2", {1: part_of(file, 1)})
    assert S3Objects(s3_root).put_file("key", file)
    assert uploads(s3_root, "key2") == [{1: PART}]


def test_sweep_aborts_uploads_that_rest_and_spares_those_that_go_on(s3_root: str, tmp_path: Path, file: Path) -> None:
    store = connect(s3_root, tmp_path / "scratch")
    begin(s3_root, "blobs/aa/rests", {1: part_of(file, 1), 2: part_of(file, 2)})
    upload = begin(s3_root, "blobs/bb/goes-on", {})
    begin(s3_root, "other/rests", {1: part_of(file, 1)})
    time.sleep(4)
    bucket, prefix = parse(s3_root)
    client().upload_part(
        Bucket=bucket, Key=f"{prefix}/blobs/bb/goes-on", UploadId=upload, PartNumber=1, Body=part_of(file, 1)
    )
    swept = sweep(store, older_than_s=2.5)
    assert (swept.counts["uploads"], swept.counts["blobs"], swept.bytes) == (1, 0, 2 * PART)
    assert uploads(s3_root, "blobs/aa/rests") == [] and uploads(s3_root, "blobs/bb/goes-on") == [{1: PART}]
    assert uploads(s3_root, "other/rests") == [{1: PART}], "what is not ours is left alone"
    assert sweep(store, older_than_s=-60).counts["uploads"] == 1


def test_bar_of_a_transfer_runs_from_what_is_there_to_the_whole(
    s3_root: str, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "TOLD_BYTES", 1_000_000)
    draft = tmp_path / "draft"
    draft.mkdir()
    size = file.stat().st_size
    (draft / "stands").write_bytes(os.urandom(2_000_000))
    file.rename(draft / "weights")
    manifest = manifest_of(draft)
    store = connect(s3_root, tmp_path / "scratch")
    for name, parts in {"weights": {1: part_of(draft / "weights", 1)}, "stands": None}.items():
        digest = manifest.files[name].sha256
        if parts:
            begin(s3_root, f"blobs/{digest[:2]}/{digest}", parts)
        else:
            store.objects.put_file(f"blobs/{digest[:2]}/{digest}", draft / name)
    up, again, down, here = Heard(), Heard(), Heard(), Heard()
    store.publish(draft, manifest, progress=up)
    store.publish(draft, manifest, progress=again)
    store.checkout(fingerprint(manifest.work), down)
    store.checkout(fingerprint(manifest.work), here)
    assert up.notes == [f"uploading 0.0 GB to {s3_root}"] and down.notes == [f"downloading 0.0 GB from {s3_root}"]
    assert [done for done, _ in up.points] == [*range(PART, size, PART), size]
    assert down.points[-1] == (size + 2_000_000, size + 2_000_000) and len(down.points) > 10
    assert (again.notes, again.points, here.notes, here.points) == ([], [], [], [])


def test_checkout_over_a_foreign_part_brings_the_right_bytes(s3_root: str, tmp_path: Path, file: Path) -> None:
    draft = tmp_path / "draft"
    (draft / "deep").mkdir(parents=True)
    file.rename(draft / "deep" / "weights")
    manifest = manifest_of(draft)
    store = connect(s3_root, tmp_path / "scratch")
    store.publish(draft, manifest)
    digest = manifest.files["deep/weights"].sha256
    bucket, prefix = parse(s3_root)
    etag = client().head_object(Bucket=bucket, Key=f"{prefix}/blobs/{digest[:2]}/{digest}")["ETag"]
    building = tmp_path / "scratch" / "views" / f".view-{fingerprint(manifest.work)}" / "deep"
    building.mkdir(parents=True)
    (building / f"weights.{digest_bytes(etag.encode())[:8]}.part").write_bytes(b"foreign" * 1000)
    (building / "weights.deadbeef.part").write_bytes(b"of a former object")
    view = store.checkout(fingerprint(manifest.work))
    assert (view / "deep" / "weights").read_bytes() == (draft / "deep" / "weights").read_bytes()
    assert [path.name for path in (view / "deep").iterdir()] == ["weights"]
