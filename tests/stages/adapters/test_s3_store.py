"""Objects in S3, against a real server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from stages.adapters.connect import FilePins, connect
from stages.adapters.s3 import client as s3_client
from stages.adapters.s3 import multipart as s3_multipart
from stages.adapters.s3 import source as s3_source
from stages.adapters.s3_store import S3Objects
from stages.adapters.sources import Wanted, open_source, pin_source
from stages.runtime import patience
from stages.runtime.contract import StageError, Unavailable
from stages.runtime.fingerprint import digest_bytes, digest_tree
from stages.runtime.progress import Silent
from stages.runtime.stores import unheard
from tests.stages.adapters.proxy import CuttingProxy
from tests.stages.runtime.test_stores import keeps_objects, publishes_and_notices_damage


def test_objects_in_s3_behave_as_those_on_a_disk(s3_root: str, tmp_path: Path) -> None:
    keeps_objects(S3Objects(s3_root), tmp_path)


def test_move_in_s3_takes_a_large_object_in_parts(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = TransferConfig(5 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr("stages.adapters.s3_store._COPIES", copies)
    objects, data = S3Objects(s3_root), os.urandom(11 << 20)
    objects.put("large", data)
    objects.move("large", "moved")
    assert objects.stat("large") is None and objects.read("moved") == data


def test_store_in_s3_publishes_once_and_notices_damage(s3_root: str, tmp_path: Path) -> None:
    store = connect(s3_root, tmp_path / "scratch")

    def damage(key: str, data: bytes) -> None:
        assert store.objects.put(key, data, replace=True)

    publishes_and_notices_damage(store, tmp_path, damage)


def test_put_raced_by_threads_is_won_by_exactly_one(s3_root: str) -> None:
    objects = S3Objects(s3_root)
    gate = threading.Barrier(6)

    def put(number: int) -> bool:
        gate.wait()
        return objects.put("raced", f"writer {number}".encode())

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(put, range(6)))
    assert won.count(True) == 1
    assert objects.read("raced") == f"writer {won.index(True)}".encode()


def test_file_larger_than_a_part_arrives_whole_and_is_put_once(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 << 20)
    objects = S3Objects(s3_root)
    big, other = tmp_path / "big", tmp_path / "other"
    big.write_bytes(os.urandom((12 << 20) + 17))
    other.write_bytes(os.urandom(6 << 20))
    assert objects.put_file("big", big)
    assert not objects.put_file("big", other)
    # The key may also be taken while the parts travel: then the last request is the one refused.
    bucket, prefix = s3_client.parse(s3_root)
    assert not s3_multipart.put_parts(bucket, f"{prefix}/big", other, lambda: False, unheard)
    objects.fetch("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()


def test_fetch_over_a_connection_that_breaks_goes_on_where_it_broke(
    s3_root: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 << 20)
    S3Objects(s3_root).put("data", data)
    with CuttingProxy(s3_endpoint, after_bytes=1 << 20) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3_client.client.cache_clear()
        S3Objects(s3_root).fetch("data", tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == data
    assert len(proxy.ranges) >= 3
    assert sum(proxy.sent) < 2 * len(data)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_download_of_a_source_goes_on_from_the_part_that_stands(s3_root: str, tmp_path: Path) -> None:
    objects = S3Objects(s3_root)
    objects.put("text/a.txt", b"alpha " * 1000)
    objects.put("text/b.bin", b"not text")
    source = f"{s3_root}/text"
    exact = s3_source.resolve(source, lambda name: name.endswith(".txt"))
    etag = s3_client.client().head_object(Bucket="enginery", Key=source.removeprefix("s3://enginery/") + "/a.txt")[
        "ETag"
    ]
    tree = tmp_path / "tree"
    tree.mkdir()
    # Bytes that are not the object's prove that what stands is kept and only the rest is fetched.
    (tree / f"a.txt.{digest_bytes(etag.encode())[:8]}.part").write_bytes(b"X" * 600)
    s3_source.download(exact, tmp_path, lambda name: name.endswith(".txt"), Silent())
    assert (tree / "a.txt").read_bytes() == b"X" * 600 + (b"alpha " * 1000)[600:]
    assert [p.name for p in tree.iterdir()] == ["a.txt"]


def test_source_that_changed_after_it_was_resolved_is_refused(s3_root: str, tmp_path: Path) -> None:
    objects = S3Objects(s3_root)
    objects.put("one.txt", b"before")
    exact = s3_source.resolve(f"{s3_root}/one.txt", lambda _: True)
    objects.put("one.txt", b"after!", replace=True)
    with pytest.raises(StageError, match="changed while it was fetched"):
        s3_source.download(exact, tmp_path, lambda _: True, Silent())
    s3_source.download(s3_source.resolve(f"{s3_root}/one.txt", lambda _: True), tmp_path, lambda _: True, Silent())
    assert (tmp_path / "file" / "one.txt").read_bytes() == b"after!"


def test_source_in_s3_is_one_with_the_same_bytes_on_a_disk_and_goes_on_without_network(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heard(Silent):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.notes.append(text)

    folder = tmp_path / "disk"
    for name, data in {"a.txt": b"alpha", "inner/b.txt": b"beta"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        S3Objects(s3_root).put(f"text/{name}", data)
    wanted = Wanted("text", ("*.txt",), "")
    pins = FilePins(tmp_path / "scratch")
    on_disk = pin_source(folder.as_uri(), wanted, digest_tree, pins, Silent())
    found = pin_source(f"{s3_root}/text", wanted, digest_tree, pins, Silent())
    assert found.digest == on_disk.digest
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3_client, "_TRIES", 1)
    monkeypatch.setattr(patience, "_of_process_s", 0.0)
    s3_client.client.cache_clear()
    assert pin_source(f"{s3_root}/text", wanted, digest_tree, pins, Heard()) == found
    assert "going on with what it was last" in Heard.notes[0]
    with pytest.raises(Unavailable):
        pin_source(f"{s3_root}/other", wanted, digest_tree, pins, Silent())
    assert digest_tree(open_source(found.exact, wanted, found.downloads, tmp_path, Silent())) == found.digest


def test_server_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    monkeypatch.setattr(s3_client, "_TRIES", 1)
    monkeypatch.setattr(patience, "_of_process_s", 0.0)
    s3_client.client.cache_clear()
    with pytest.raises(Unavailable, match="no server answers"):
        connect("s3://bucket/prefix", tmp_path)
    s3_client.client.cache_clear()


def test_missing_bucket_is_named(s3_root: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="s3://nowhere-at-all") as caught:
        list(S3Objects("s3://nowhere-at-all/x").list(""))
    assert not isinstance(caught.value, Unavailable)


@pytest.mark.parametrize("user", ["reader", "nobody"])
def test_bucket_that_one_may_not_write_to_is_refused(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user)
    s3_client.client.cache_clear()
    with pytest.raises(StageError, match=r"access to s3://.* is denied.*credentials"):
        connect(s3_root, tmp_path)


def test_missing_credentials_are_said_with_the_remedy(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3_client.client.cache_clear()
    with pytest.raises(StageError, match="AWS_ACCESS_KEY_ID"):
        S3Objects(s3_root).probe()


def test_source_with_nothing_below_it_is_refused(s3_root: str) -> None:
    with pytest.raises(StageError, match="holds nothing of use"):
        s3_source.resolve(f"{s3_root}/empty", lambda _: True)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key"])
def test_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(StageError, match="names no bucket"):
        s3_client.parse(uri)
