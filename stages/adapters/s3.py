"""A store's objects in S3, or in what speaks its protocol."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from botocore.exceptions import ClientError

from stages.adapters.s3_client import TRIES, client, fetch_object, listed, parse, spoken, status_of
from stages.runtime.contract import StageError
from stages.runtime.stores import ObjectStat

PART_BYTES = 1 << 26
"""Larger files go up in parts of this size, so that a failure repeats 64 MB and not 64 GB."""
_PARTS_LIMIT = 10_000


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
        with spoken(self._name(key)):
            try:
                found = client().head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise
        return ObjectStat(key, found["ContentLength"], found["LastModified"].timestamp())

    def read(self, key: str) -> bytes | None:
        """See Objects."""
        with spoken(self._name(key)):
            try:
                return client().get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()
            except client().exceptions.NoSuchKey:
                return None

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """See Objects."""
        where = {"Bucket": self._bucket, "Key": self._prefix + key}
        if replace:
            with spoken(self._name(key)):
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
        fetch_object(self._bucket, self._prefix + key, path, lambda _: None)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """See Objects."""
        for key, size, modified, _ in listed(self._bucket, self._prefix + prefix):
            yield ObjectStat(key.removeprefix(self._prefix), size, modified)

    def delete(self, key: str) -> None:
        """See Objects."""
        with spoken(self._name(key)):
            client().delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _if_absent(self, key: str, put: Callable[[], object]) -> bool:
        """Whether a conditional write took place. 409 says that another was under way: ask again."""
        with spoken(self._name(key)):
            for attempt in range(TRIES):
                try:
                    put()
                    return True
                except ClientError as error:
                    if status_of(error) == 412:
                        return False
                    if status_of(error) != 409 or attempt == TRIES - 1:
                        raise
                    time.sleep(0.1 * 2**attempt)
        raise AssertionError

    def _put_parts(self, key: str, path: Path, size: int) -> bool:
        length = max(PART_BYTES, -(-size // _PARTS_LIMIT))
        full = self._prefix + key
        with spoken(self._name(key)):
            upload = client().create_multipart_upload(Bucket=self._bucket, Key=full)["UploadId"]

        def send(number: int) -> dict[str, object]:
            with path.open("rb") as stream:
                stream.seek((number - 1) * length)
                data = stream.read(length)
            done = client().upload_part(Bucket=self._bucket, Key=full, UploadId=upload, PartNumber=number, Body=data)
            return {"ETag": done["ETag"], "PartNumber": number}

        try:
            with spoken(self._name(key)), ThreadPoolExecutor(2) as pool:
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
