"""The S3 client, its errors as ours, and the two ways of reading: a listing and an object."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnection

from stages.runtime.contract import StageError, Unavailable
from stages.runtime.fingerprint import digest_bytes

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

TRIES = 6
_CHUNK = 1 << 20


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
            retries={"mode": "adaptive", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or TRIES)},
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


def listed(bucket: str, prefix: str) -> Iterator[tuple[str, int, float, str]]:
    """(key, bytes, seconds since the epoch, ETag) of each object below a prefix, in key order."""
    pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    with spoken(f"s3://{bucket}/{prefix}"):
        for page in pages:
            for one in page.get("Contents", []):
                yield one["Key"], one["Size"], one["LastModified"].timestamp(), one["ETag"]


def fetch_object(bucket: str, key: str, path: Path, arrived: Callable[[int], None]) -> None:
    """An object to a file, over as many connections as it takes; a `.part` of the same object goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with spoken(f"s3://{bucket}/{key}"):
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
            except (NoConnection, HTTPClientError, IncompleteReadError):
                failures = failures + 1 if part.stat().st_size == have else 0
                if failures == TRIES:
                    raise
                time.sleep(0.1 * 2**failures)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.rename(path)


def status_of(error: ClientError) -> int:
    """The HTTP status of the server's answer."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def code_of(error: ClientError) -> str:
    """The server's name for what went wrong."""
    return error.response["Error"].get("Code", "")


@contextmanager
def spoken(name: str) -> Iterator[None]:
    """The server's errors as ours: what a person must mend, and what another try may mend."""
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StageError(
            f"there are no credentials for {name}",
            remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        ) from error
    except (NoConnection, HTTPClientError, IncompleteReadError) as error:
        raise Unavailable(
            f"no server answers for {name}",
            measured=type(error).__name__,
            remedy="Check the network and AWS_ENDPOINT_URL.",
        ) from error
    except ClientError as error:
        status, code = status_of(error), code_of(error)
        if status >= 500 or status == 429:
            raise Unavailable(f"the server failed on {name}", measured=f"HTTP {status} {code}") from error
        if status in (409, 412):
            raise Unavailable(f"{name} was changed by another meanwhile", measured=code, remedy="Run again.") from error
        if status in (401, 403):
            raise StageError(
                f"access to {name} is denied", measured=code, remedy="Check the credentials and the bucket's policy."
            ) from error
        if code == "NoSuchBucket" or status == 404:
            raise StageError(f"{name} does not exist", measured=code, remedy="Check the bucket's name.") from error
        raise
