"""The S3 client, its errors as ours, and the two ways of reading: a listing and an object."""

from __future__ import annotations

import http.client
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import urllib3.exceptions
from botocore import exceptions as of_boto
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from stages.runtime.contract import StageError, Unavailable
from stages.runtime.fingerprint import digest_bytes
from stages.runtime.patience import patiently

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_TRIES = 3
"""Of one request, by boto3: what goes wrong once. A server that is away is `patiently`'s."""
_CHUNK = 1 << 20
_RAW = (urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError)
"""What boto3 lets through while it reads a body."""
_BROKEN = (
    of_boto.HTTPClientError,
    of_boto.ConnectionError,
    of_boto.IncompleteReadError,
    of_boto.ChecksumError,
    of_boto.FlexibleChecksumError,
    of_boto.CapacityNotAvailableError,
    *_RAW,
)
_NO_CREDENTIALS = (
    of_boto.NoCredentialsError,
    of_boto.PartialCredentialsError,
    of_boto.CredentialRetrievalError,
    of_boto.UnknownCredentialError,
    of_boto.NoAuthTokenError,
    of_boto.TokenRetrievalError,
    of_boto.UnknownTokenProviderError,
    of_boto.RefreshWithMFAUnsupportedError,
    of_boto.MetadataRetrievalError,
    of_boto.ProfileNotFound,
    of_boto.SSOError,
    of_boto.LoginError,
)
_EXPIRED = frozenset(
    ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired")
)
_ELSEWHERE = frozenset(("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"))
"""The bucket is of another region than the one that is asked."""
_BUSY = frozenset(
    ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests",
     "BandwidthLimitExceeded", "InternalError", "ServiceUnavailable")
)  # fmt: skip

T = TypeVar("T")


@cache
def client() -> S3Client:
    """The one client of this process, set by the usual AWS environment. It is safe to use from several threads.

    Raises:
        StageError: the environment says what is not understood.
    """
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    try:
        # A session of its own: the default one keeps the credentials it first saw.
        return boto3.session.Session().client(
            "s3",
            config=Config(
                # Newer checksums are unknown to most servers that are not Amazon's.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "adaptive", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or _TRIES)},
                connect_timeout=10,
                read_timeout=60,
                s3={"addressing_style": "path"} if own_endpoint else {},
            ),
            region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        )
    except ValueError as error:
        raise StageError(
            "what the environment says of S3 is not understood",
            measured=error,
            remedy="Check AWS_ENDPOINT_URL (http://host:port), AWS_REGION and AWS_MAX_ATTEMPTS.",
        ) from error


def parse(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key, the key without slashes at its ends; `#`, `?` and `%` are of a key, too.

    Raises:
        StageError: there is no bucket.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not re.fullmatch(r"[\w.:-]+", bucket):
        raise StageError(f"{uri} names no bucket", limit="s3://bucket/prefix", remedy="Write it in this form.")
    return bucket, key.strip("/")


def listed(bucket: str, prefix: str) -> Iterator[tuple[str, int, float, str]]:
    """(key, bytes, seconds since the epoch, ETag) of each object below a prefix, in key order."""
    name = f"s3://{bucket}/{prefix}"
    with spoken(name):
        for page in pages(name, "list_objects_v2", "ContinuationToken", Bucket=bucket, Prefix=prefix):
            for one in page.get("Contents", []):
                yield one["Key"], one["Size"], one["LastModified"].timestamp(), one["ETag"]


def pages(name: str, operation: str, *tokens: str, **where: str) -> Iterator[dict[str, Any]]:
    """Page after page of a listing; a server that goes away in the middle is asked for that page again.

    Args:
        name: of what is listed.
        operation: the client's method.
        tokens: the arguments that say where to go on; an answer has them as `Next...`.
        where: its other arguments.
    """
    after: dict[str, Any] = {}
    while True:
        page = asked(name, lambda: getattr(client(), operation)(**where, **after))  # noqa: B023
        yield page
        if not page.get("IsTruncated"):
            return
        after = {token: page[f"Next{token}"] for token in tokens}


def fetch_object(bucket: str, key: str, path: Path, arrived: Callable[[int], None]) -> None:
    """An object to a file, over as many connections as it takes; a `.part` of the same object goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"s3://{bucket}/{key}"
    with spoken(name):
        head = asked(name, lambda: client().head_object(Bucket=bucket, Key=key))
        size, etag = head["ContentLength"], head["ETag"]
        part = path.with_name(f"{path.name}.{digest_bytes(etag.encode())[:8]}.part")
        part.touch()
        arrived(part.stat().st_size)

        def more() -> None:
            have = part.stat().st_size
            try:
                body = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={have}-", IfMatch=etag)["Body"]
                with part.open("ab") as out:
                    for chunk in body.iter_chunks(_CHUNK):
                        out.write(chunk)
                        arrived(len(chunk))
            except _BROKEN:
                if part.stat().st_size == have:  # else the server is there, and the rest is asked for
                    raise

        while part.stat().st_size < size:
            asked(name, more)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.rename(path)


def asked(name: str, ask: Callable[[], T]) -> T:
    """What the server answers; while it is away it is asked again, as long as this process is patient.

    Raises:
        Unavailable: it stayed away.
        ClientError, BotoCoreError: it answered, or was never asked; `spoken` says what that means.
    """

    def once() -> T:
        try:
            return ask()
        except (BotoCoreError, ClientError, *_RAW) as error:
            if (away := _away(name, error)) is not None:
                raise away from error
            raise

    return patiently(once)


def _away(name: str, error: Exception) -> Unavailable | None:
    """The error of a server that another try may reach; None for what stays as it is."""
    if isinstance(error, ClientError):
        status, code = status_of(error), code_of(error)
        if status >= 500 or status in (408, 429) or code in _BUSY:
            return Unavailable(f"the server failed on {name}", measured=f"HTTP {status} {code}")
        return None
    if isinstance(error, _BROKEN) and not _distrusted(error):
        return Unavailable(
            f"no server answers for {name}",
            measured=type(error).__name__,
            remedy="Check the network and AWS_ENDPOINT_URL.",
        )
    return None


def _distrusted(error: Exception) -> bool:
    """Whether a server shows a certificate that is not trusted, which no other try mends."""
    return isinstance(error, of_boto.SSLError) and "certificate verify failed" in str(error).lower()


def status_of(error: ClientError) -> int:
    """The HTTP status of the server's answer; 0 where it told none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """The server's name for what went wrong."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def spoken(name: str) -> Iterator[None]:
    """The server's errors as ours: what a person must mend, and what another try may mend."""
    try:
        yield
    except (BotoCoreError, ClientError, *_RAW) as error:
        raise _away(name, error) or _mended_by_a_person(name, error) from error
    except RecursionError as error:  # boto3 asks a server that redirects where the bucket is, and is redirected
        raise _elsewhere(name, "every request is redirected") from error


def _elsewhere(name: str, measured: str) -> StageError:
    return StageError(
        f"{name} is not where it is asked for",
        measured=measured,
        remedy="Check the bucket's region in AWS_REGION, and AWS_ENDPOINT_URL: http or https, host, port.",
    )


def _mended_by_a_person(name: str, error: Exception) -> StageError:
    if isinstance(error, _NO_CREDENTIALS):
        return StageError(
            f"there are no credentials for {name}",
            measured=error,
            remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )
    if _distrusted(error):
        return StageError(
            f"the server of {name} shows a certificate that is not trusted",
            measured=error,
            remedy="Name its authority's file in AWS_CA_BUNDLE.",
        )
    if not isinstance(error, ClientError):
        return StageError(
            f"S3 cannot be used for {name}",
            measured=f"{type(error).__name__}: {error}",
            remedy="Check what the environment and ~/.aws/config say of S3.",
        )
    status, code = status_of(error), code_of(error)
    if code in _EXPIRED:
        return StageError(
            f"access to {name} is denied", measured=code, remedy="Renew the session's credentials, then run again."
        )
    if code in _ELSEWHERE or status in (301, 307, 308):
        return _elsewhere(name, f"HTTP {status} {code}")
    if status in (409, 412):
        return Unavailable(f"{name} was changed by another meanwhile", measured=code, remedy="Run again.")
    if code == "RequestTimeTooSkewed":
        return StageError(f"access to {name} is denied", measured=code, remedy="Set this machine's clock.")
    if status in (401, 403):
        return StageError(
            f"access to {name} is denied", measured=code, remedy="Check the credentials and the bucket's policy."
        )
    if code == "NoSuchBucket" or status == 404:
        return StageError(f"{name} does not exist", measured=code, remedy="Check the bucket's name.")
    return StageError(
        f"the server refused what was asked of {name}",
        measured=f"HTTP {status} {error}",
        # A refused HEAD has no body that would say more.
        remedy="Check the credentials and their age, the bucket's region in AWS_REGION, and AWS_ENDPOINT_URL.",
    )
