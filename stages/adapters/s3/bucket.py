"""The bucket of a store, made where it is missing."""

from __future__ import annotations

from botocore.exceptions import ClientError

from stages.adapters.s3.client import asked, client, parse, spoken, status_of


def has_bucket(uri: str) -> bool:
    """Whether the bucket that a URI names is there.

    Raises:
        StageError: one may not ask.
        Unavailable: the server does not answer.
    """
    bucket, _ = parse(uri)
    name = f"s3://{bucket}"
    with spoken(name):
        try:
            asked(name, lambda: client().head_bucket(Bucket=bucket))
        except ClientError as error:
            if status_of(error) != 404:
                raise
            return False
    return True


def ensure_bucket(uri: str) -> bool:
    """Make the bucket that a URI names; False when it stands already.

    Raises:
        StageError: one may not make it.
        Unavailable: the server does not answer.
    """
    if has_bucket(uri):
        return False
    bucket, _ = parse(uri)
    name = f"s3://{bucket}"
    with spoken(name):
        asked(name, lambda: client().create_bucket(Bucket=bucket))
    return True
