"""Large files to S3 in parts that outlive the process that sent them."""

from __future__ import annotations

import contextvars
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from stages.adapters.s3.client import asked, client, code_of, pages, status_of
from stages.runtime.contract import Unavailable
from stages.runtime.stores import Moved

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, MultipartUploadTypeDef, PartTypeDef

PART_BYTES = 1 << 26
"""Larger files go up in parts of this size, so that a failure repeats 64 MB and not 64 GB."""
_PARTS_LIMIT = 10_000
_TRIES = 6
"""Of what another writer ends or is about to."""
_IN_FLIGHT = 2
"""Parts read and sent at once: what an upload takes of memory, in parts."""


def put_parts(bucket: str, key: str, path: Path, stands: Callable[[], bool], moved: Moved) -> bool:
    """Put a file if absent, going on with an upload of the same key; False when the key stood already.

    Nothing is aborted here, since another writer may be completing what seems lost: `sweep` does it later. SeaweedFS
    lets two uploads of a key complete at once, each as the first, so the key must name the content.

    Args:
        bucket: where to.
        key: the object's whole key.
        path: the file.
        stands: whether the object is there.
        moved: told the bytes of each part that is there.

    Raises:
        Unavailable: each upload was ended by another, and no object came of it.
    """
    name = f"s3://{bucket}/{key}"
    begun = [one["UploadId"] for one in _uploads(bucket, key) if one["Key"] == key]
    for _ in range(_TRIES):
        upload = begun.pop(0) if begun else asked(name, lambda: _begun(bucket, key))
        try:
            return _complete(bucket, key, upload, _send(bucket, key, upload, path, moved))
        except ClientError as error:
            # Another writer ended the upload, or put other bytes into one of its parts.
            if code_of(error) not in ("NoSuchUpload", "InvalidPart"):
                raise
        if stands():
            return False
    raise Unavailable(f"uploads of {name} are ended by another", measured=f"{_TRIES} uploads")


def _begun(bucket: str, key: str) -> str:
    return client().create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]


def if_absent(name: str, put: Callable[[], object]) -> bool:
    """Whether a conditional write took place. 409 says that another was under way: ask again."""
    for attempt in range(_TRIES):
        try:
            asked(name, put)
            return True
        except ClientError as error:
            if status_of(error) == 412:
                return False
            if status_of(error) != 409 or attempt == _TRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError


def sweep(bucket: str, prefix: str, *, older_than_s: float, dry: bool = False) -> tuple[int, int]:
    """Abort uploads below a prefix that rest for so long, or with `dry` look only; returns how many, and their bytes.

    What nobody completes is billed like an object and listed nowhere.
    """
    before, count, freed = time.time() - older_than_s, 0, 0
    for upload in [*_uploads(bucket, prefix)]:
        key, name = upload["Key"], upload["UploadId"]
        try:
            parts = [*_parts(bucket, key, name)]
            # An upload that is gone on with began long ago, but has young parts.
            if max([upload["Initiated"], *(one["LastModified"] for one in parts)]).timestamp() >= before:
                continue
            if not dry:
                asked(f"s3://{bucket}/{key}", lambda: _abort(bucket, key, name))  # noqa: B023
        except client().exceptions.NoSuchUpload:
            continue
        count, freed = count + 1, freed + sum(one["Size"] for one in parts)
    return count, freed


def _abort(bucket: str, key: str, upload: str) -> None:
    client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)


def _uploads(bucket: str, prefix: str) -> Iterator[MultipartUploadTypeDef]:
    name, after = f"s3://{bucket}/{prefix}", ("KeyMarker", "UploadIdMarker")
    for page in pages(name, "list_multipart_uploads", *after, Bucket=bucket, Prefix=prefix):
        yield from page.get("Uploads", [])


def _parts(bucket: str, key: str, upload: str) -> Iterator[PartTypeDef]:
    name = f"s3://{bucket}/{key}"
    for page in pages(name, "list_parts", "PartNumberMarker", Bucket=bucket, Key=key, UploadId=upload):
        yield from page.get("Parts", [])


def _send(bucket: str, key: str, upload: str, path: Path, moved: Moved) -> list[CompletedPartTypeDef]:
    """Send the parts that do not stand. Where a server's ETag is no MD5, as with KMS keys, that is every part."""
    size = path.stat().st_size
    length = max(PART_BYTES, -(-size // _PARTS_LIMIT))
    standing = {(one["PartNumber"], one["Size"], one["ETag"].strip('"')) for one in _parts(bucket, key, upload)}

    def sent(number: int, data: bytes) -> str:
        return client().upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data)["ETag"]

    def send(number: int) -> tuple[int, CompletedPartTypeDef]:
        with path.open("rb") as stream:
            stream.seek((number - 1) * length)
            data = stream.read(length)
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if (number, len(data), etag) not in standing:
            etag = asked(f"s3://{bucket}/{key}", lambda: sent(number, data))
        return len(data), {"ETag": etag, "PartNumber": number}

    parts: list[CompletedPartTypeDef] = []
    patience = contextvars.copy_context()
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        for count, part in pool.map(lambda one: patience.copy().run(send, one), range(1, -(-size // length) + 1)):
            parts.append(part)
            moved(count)
    return parts


def _complete(bucket: str, key: str, upload: str, parts: list[CompletedPartTypeDef]) -> bool:
    return if_absent(
        f"s3://{bucket}/{key}",
        lambda: client().complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
        ),
    )
