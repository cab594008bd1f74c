"""A store's objects in S3, or in what speaks its protocol."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from stages.adapters.s3 import multipart as s3_multipart
from stages.adapters.s3.client import asked, client, fetch_object, listed, parse, spoken, status_of
from stages.runtime.contract import StageError
from stages.runtime.stores import Moved, Objects, ObjectStat, unheard

_COPIES = TransferConfig(multipart_threshold=1 << 28, multipart_chunksize=1 << 28)
"""A server copies at most 5 GB in one request, and has to answer before the connection is given up."""


def open_store(uri: str) -> Objects:
    """The store at s3://bucket/prefix."""
    return S3Objects(uri)


class S3Objects:
    """Keyed bytes below a prefix of a bucket; put-if-absent is `IfNoneMatch: *`, settled by the server."""

    remote = True

    def __init__(self, uri: str) -> None:
        self._bucket, prefix = parse(uri)
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self._bucket}/{prefix}".rstrip("/")

    def probe(self, *, writing: bool = True) -> None:
        """See Objects. One object is put twice: the second must be refused.

        Raises:
            StageError: one may not write here, or the server overwrites where it was told not to; without `writing`:
                nothing is here, or one may not read it.
            Unavailable: the server does not answer.
        """
        if not writing:
            self._look()
            return
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
                found = asked(
                    self._name(key), lambda: client().head_object(Bucket=self._bucket, Key=self._prefix + key)
                )
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise
        return ObjectStat(key, found["ContentLength"], found["LastModified"].timestamp())

    def read(self, key: str) -> bytes | None:
        """See Objects."""
        with spoken(self._name(key)):
            try:
                return asked(
                    self._name(key),
                    lambda: client().get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read(),
                )
            except client().exceptions.NoSuchKey:
                return None

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """See Objects."""
        where = {"Bucket": self._bucket, "Key": self._prefix + key}
        if replace:
            with spoken(self._name(key)):
                asked(self._name(key), lambda: client().put_object(**where, Body=data))  # type: ignore[arg-type]
            return True
        with spoken(self._name(key)):
            return s3_multipart.if_absent(
                self._name(key),
                lambda: client().put_object(**where, Body=data, IfNoneMatch="*"),  # type: ignore[arg-type]
            )

    def put_file(self, key: str, path: Path, moved: Moved = unheard) -> bool:
        """See Objects. A large file goes up in parts, and goes on with those that an interrupted upload left."""
        if self.stat(key):
            return False
        size = path.stat().st_size
        if size > s3_multipart.PART_BYTES:
            with spoken(self._name(key)):
                return s3_multipart.put_parts(
                    self._bucket, self._prefix + key, path, lambda: self.stat(key) is not None, moved
                )
        placed = self.put(key, path.read_bytes())
        moved(size)
        return placed

    def fetch(self, key: str, path: Path, moved: Moved = unheard) -> None:
        """See Objects. A transfer that breaks is taken up again where it broke, by this process or the next."""
        fetch_object(self._bucket, self._prefix + key, path, moved)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """See Objects."""
        for key, size, modified, _ in listed(self._bucket, self._prefix + prefix):
            yield ObjectStat(key.removeprefix(self._prefix), size, modified)

    def move(self, key: str, to: str) -> None:
        """See Objects. The server copies, a large object in parts."""
        source = {"Bucket": self._bucket, "Key": self._prefix + key}
        with spoken(self._name(key)):
            try:
                if self.stat(to) is None:
                    client().copy(source, self._bucket, self._prefix + to, Config=_COPIES)  # type: ignore[arg-type]
            except ClientError as error:
                if status_of(error) != 404:
                    raise
                return
        self.delete(key)

    def delete(self, key: str) -> None:
        """See Objects."""
        with spoken(self._name(key)):
            asked(self._name(key), lambda: client().delete_object(Bucket=self._bucket, Key=self._prefix + key))

    def sweep_uploads(self, prefix: str, *, older_than_s: float, dry: bool = False) -> tuple[int, int]:
        """See Objects. They are uploads in parts that nobody completed."""
        with spoken(self._name(prefix)):
            return s3_multipart.sweep(self._bucket, self._prefix + prefix, older_than_s=older_than_s, dry=dry)

    def _look(self) -> None:
        with spoken(self.uri):
            found = client().list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        if not found.get("Contents"):
            raise StageError(
                f"there is no store at {self.uri}",
                remedy="Name the one that a run has made with --store or $ENGINERY_STORE.",
            )

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}"
