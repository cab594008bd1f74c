"""The bucket of a store, made where it is missing."""

from __future__ import annotations

from botocore.exceptions import ClientError

from stages.adapters.s3_client import asked, client, parse, spoken, status_of


def ensure_bucket(uri: str) -> bool:
    """Make the bucket that a URI names; False when it stands already.

    Raises:
        StageError: one may not make it.
        Unavailable: the server does not answer.
    """
    bucket, _ = parse(uri)
    name = f"s3://{bucket}"
    with spoken(name):
        try:
            asked(name, lambda: client().head_bucket(Bucket=bucket))
            return False
        except ClientError as error:
            if status_of(error) != 404:
                raise
        asked(name, lambda: client().create_bucket(Bucket=bucket))
    return True
