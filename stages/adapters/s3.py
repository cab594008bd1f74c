"""Objects in S3 or what speaks its protocol: the store's, and sources of checkpoints and text."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as NoConnection,
)

from stages.runtime.contract import Progress, StageError, Unavailable
from stages.runtime.fingerprint import canonical, digest_bytes
from stages.runtime.stores import ObjectStat

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 1 << 26
"""Larger files go up in parts of this size, so that a failure repeats 64 MB and not 64 GB."""
_PARTS_LIMIT = 10_000
_CHUNK = 1 << 20
_TRIES = 6


@cache
def client() -> S3Client:
    """The one client of this process, set by the usual AWS environment. It is safe to use from several threads."""
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # A session of its own: the default one keeps the credentials it first saw.
    return boto3.session.Session().client(
        "s3",
        config=Config(
            # Newer checksums are unknown to most servers that are not Amazon's.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "adaptive", "max_attempts": _TRIES},
            connect_timeout=10,
            read_timeout=60,
            s3={"addressing_style": "path"} if own_endpoint else {},
        ),
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
    )


def parse(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key, the key without slashes at its ends.

    Raises:
        StageError: there is no bucket.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise StageError(f"{uri} names no bucket", limit="s3://bucket/prefix", remedy="Write it in this form.")
    return parts.netloc, parts.path.strip("/")


class S3Objects:
    """Keyed bytes below a prefix of a bucket; put-if-absent is `IfNoneMatch: *`, settled by the server."""

    def __init__(self, uri: str) -> None:
        self._bucket, prefix = parse(uri)
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self._bucket}/{prefix}".rstrip("/")

    def probe(self) -> None:
        """Put one object twice: the second must be refused.

        Raises:
            StageError: one may not write here, or the server overwrites where it was told not to.
            Unavailable: the server does not answer.
        """
        key = f".probe-{uuid.uuid4().hex}"
        try:
            first, second = self.put(key, b"probe"), self.put(key, b"probe again")
        finally:
            self.delete(key)
        if not first or second:
            raise StageError(
                f"the server of {self.uri} ignores conditional writes (IfNoneMatch)",
                remedy="Use a server that knows them: two runs could overwrite each other here.",
            )

    def stat(self, key: str) -> ObjectStat | None:
        """See Objects."""
        with _spoken(self._name(key)):
            try:
                found = client().head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        return ObjectStat(key, found["ContentLength"], found["LastModified"].timestamp())

    def read(self, key: str) -> bytes | None:
        """See Objects."""
        with _spoken(self._name(key)):
            try:
                return client().get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()
            except client().exceptions.NoSuchKey:
                return None

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """See Objects."""
        where = {"Bucket": self._bucket, "Key": self._prefix + key}
        if replace:
            with _spoken(self._name(key)):
                client().put_object(**where, Body=data)  # type: ignore[arg-type]
            return True
        return self._if_absent(key, lambda: client().put_object(**where, Body=data, IfNoneMatch="*"))  # type: ignore[arg-type]

    def put_file(self, key: str, path: Path) -> bool:
        """See Objects."""
        if self.stat(key):
            return False
        size = path.stat().st_size
        if size > PART_BYTES:
            return self._put_parts(key, path, size)
        return self.put(key, path.read_bytes())

    def fetch(self, key: str, path: Path) -> None:
        """See Objects. A connection that breaks is taken up again where it broke."""
        _download(self._bucket, self._prefix + key, path, lambda _: None)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """See Objects."""
        for key, size, modified, _ in _listed(self._bucket, self._prefix + prefix):
            yield ObjectStat(key.removeprefix(self._prefix), size, modified)

    def delete(self, key: str) -> None:
        """See Objects."""
        with _spoken(self._name(key)):
            client().delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _if_absent(self, key: str, put: Callable[[], object]) -> bool:
        """Whether a conditional write took place. 409 says that another was under way: ask again."""
        with _spoken(self._name(key)):
            for attempt in range(_TRIES):
                try:
                    put()
                    return True
                except ClientError as error:
                    if _status(error) == 412:
                        return False
                    if _status(error) != 409 or attempt == _TRIES - 1:
                        raise
                    time.sleep(0.1 * 2**attempt)
        raise AssertionError

    def _put_parts(self, key: str, path: Path, size: int) -> bool:
        length = max(PART_BYTES, -(-size // _PARTS_LIMIT))
        full = self._prefix + key
        with _spoken(self._name(key)):
            upload = client().create_multipart_upload(Bucket=self._bucket, Key=full)["UploadId"]

        def send(number: int) -> dict[str, object]:
            with path.open("rb") as stream:
                stream.seek((number - 1) * length)
                data = stream.read(length)
            done = client().upload_part(Bucket=self._bucket, Key=full, UploadId=upload, PartNumber=number, Body=data)
            return {"ETag": done["ETag"], "PartNumber": number}

        try:
            with _spoken(self._name(key)), ThreadPoolExecutor(2) as pool:
                parts = list(pool.map(send, range(1, -(-size // length) + 1)))
            placed = self._if_absent(
                key,
                lambda: client().complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=full,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
                    IfNoneMatch="*",
                ),
            )
        except BaseException:
            # Parts of an upload that nobody completes are billed for ever and listed nowhere.
            client().abort_multipart_upload(Bucket=self._bucket, Key=full, UploadId=upload)
            raise
        if not placed:
            client().abort_multipart_upload(Bucket=self._bucket, Key=full, UploadId=upload)
        return placed


def resolve(source: str, takes: Callable[[str], bool]) -> str:
    """The source with a digest of names, sizes and ETags after `#`: the same as long as no object changed.

    Raises:
        StageError: there is nothing, or one may not read it.
        Unavailable: the server does not answer.
    """
    return f"{source}#{_state(_members(source, takes))}"


def download(exact: str, part: Path, takes: Callable[[str], bool], progress: Progress) -> None:
    """Bring the objects of a resolved source; what is whole is kept and what is cut short goes on.

    Raises:
        StageError: an object changed since the source was resolved.
    """
    source, _, state = exact.rpartition("#")
    bucket, key = parse(source)
    members = _members(source, takes)
    if _state(members) != state:
        raise StageError(f"{source} changed while it was fetched", remedy="Run again to take it as it is now.")
    total, done = sum(size for _, size, _, _ in members), 0

    def arrived(count: int) -> None:
        nonlocal done
        done += count
        progress.advanced(done, total)

    for name, size, _, _ in members:
        single = name == key
        target = part / "file" / Path(name).name if single else part / "tree" / name.removeprefix(f"{key}/")
        if target.is_file():
            arrived(size)
        else:
            _download(bucket, name, target, arrived)


def _members(source: str, takes: Callable[[str], bool]) -> list[tuple[str, int, float, str]]:
    bucket, key = parse(source)
    found = [one for one in _listed(bucket, key) if one[0] == key] if key else []
    found = found or [one for one in _listed(bucket, f"{key}/" if key else "") if takes(one[0])]
    if not found:
        raise StageError(f"{source} holds nothing of use", remedy="Check bucket and prefix in `source`.")
    return found


def _state(members: list[tuple[str, int, float, str]]) -> str:
    return digest_bytes(canonical([[name, size, etag] for name, size, _, etag in members]))[:16]


def _listed(bucket: str, prefix: str) -> Iterator[tuple[str, int, float, str]]:
    """(key, bytes, seconds since the epoch, ETag) of each object below a prefix, in key order."""
    pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    with _spoken(f"s3://{bucket}/{prefix}"):
        for page in pages:
            for one in page.get("Contents", []):
                yield one["Key"], one["Size"], one["LastModified"].timestamp(), one["ETag"]


def _download(bucket: str, key: str, path: Path, arrived: Callable[[int], None]) -> None:
    """An object to a file, over as many connections as it takes; a `.part` of the same object goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _spoken(f"s3://{bucket}/{key}"):
        head = client().head_object(Bucket=bucket, Key=key)
        size, etag = head["ContentLength"], head["ETag"]
        part = path.with_name(f"{path.name}.{digest_bytes(etag.encode())[:8]}.part")
        part.touch()
        arrived(part.stat().st_size)
        failures = 0
        while (have := part.stat().st_size) < size:
            try:
                body = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={have}-", IfMatch=etag)["Body"]
                with part.open("ab") as out:
                    for chunk in body.iter_chunks(_CHUNK):
                        out.write(chunk)
                        arrived(len(chunk))
            except (NoConnection, HTTPClientError, BotoCoreError):
                failures = failures + 1 if part.stat().st_size == have else 0
                if failures == _TRIES:
                    raise
                time.sleep(0.1 * 2**failures)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.rename(path)


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


@contextmanager
def _spoken(name: str) -> Iterator[None]:
    """The server's errors as ours: what a person must mend, and what another try may mend."""
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StageError(
            f"there are no credentials for {name}",
            remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        ) from error
    except (NoConnection, HTTPClientError) as error:
        raise Unavailable(
            f"no server answers for {name}",
            measured=type(error).__name__,
            remedy="Check the network and AWS_ENDPOINT_URL.",
        ) from error
    except ClientError as error:
        status, code = _status(error), error.response["Error"].get("Code", "")
        if status >= 500 or status == 429:
            raise Unavailable(f"the server failed on {name}", measured=f"HTTP {status} {code}") from error
        if status in (401, 403):
            raise StageError(
                f"access to {name} is denied", measured=code, remedy="Check the credentials and the bucket's policy."
            ) from error
        if code == "NoSuchBucket" or status == 404:
            raise StageError(f"{name} does not exist", measured=code, remedy="Check the bucket's name.") from error
        raise
