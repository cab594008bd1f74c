"""MLflow's errors as ours, whichever library raised them: its own, requests, SQLAlchemy, boto3 below its artifacts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from stages.runtime.contract import DoesNotFit, StageError, Unavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

PASSING = frozenset({
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "INTERNAL_ERROR",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "TEMPORARILY_UNAVAILABLE",
})  # fmt: skip
MISSING = "RESOURCE_DOES_NOT_EXIST"
STANDS = "RESOURCE_ALREADY_EXISTS"
_FULL = "database or disk is full"
_UNUSABLE = (
    "file is not a database",
    "database disk image is malformed",
    "attempt to write a readonly database",
    "unable to open database file",
)
"""What SQLite says of a database that no waiting mends; a locked one is waited for."""
_REMEDY = "Start it and see its log, or unset MLFLOW_TRACKING_URI to record in the embedded database."


class Refused(StageError):
    """MLflow answered and said no. `code` is its name for the reason, empty where there is none."""

    code = ""


def answering(client: MlflowClient, uri: str) -> MlflowClient:
    """A client whose every error is ours; see `answered`."""
    return cast("MlflowClient", _Answering(client, uri))


@contextmanager
def answered(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into ours.

    Raises:
        Unavailable: another try may help.
        Refused: none does; with MLflow's text.
    """
    try:
        yield
    except Exception as error:
        ours = _ours(error, uri)
        if ours is None:
            raise
        raise ours from error


def do_each(acts: Iterable[Callable[[], object]]) -> None:
    """Do each of these, also where MLflow refuses one.

    Raises:
        Unavailable: MLflow does not answer; the rest is left.
        StageError: the first refusal, once all are done.
    """
    refused = []
    for act in acts:
        try:
            act()
        except Unavailable:
            raise
        except StageError as error:
            refused.append(error)
    for first in refused:
        raise first


class _Answering:
    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client, self._uri = client, uri

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def asked(*args: Any, **kwargs: Any) -> Any:
            with answered(self._uri):
                return found(*args, **kwargs)

        return asked


def _ours(error: Exception, uri: str) -> StageError | None:
    """The error as ours, None where no service raised it."""
    import requests
    import urllib3
    from mlflow.exceptions import MlflowException
    from sqlalchemy import exc

    if (ours := _of_sqlite(str(error), uri)) is not None:
        return ours
    if isinstance(error, MlflowException):
        return _away(error, uri) if error.error_code in PASSING else _refused(error, uri, error.error_code)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return _away(error, uri) if status >= 500 or status == 429 else _refused(error, uri)
    if isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError):
        return _away(error, uri)
    if isinstance(error, exc.SQLAlchemyError):
        passing = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)
        return _away(error, uri) if isinstance(error, passing) else _refused(error, uri)
    # Only a process that has loaded boto3 can have met its errors; loading it for each refusal would cost a second.
    return _of_s3(error, uri) if "boto3" in sys.modules else None


def _of_sqlite(text: str, uri: str) -> StageError | None:
    if "(sqlite3." not in text:
        return None
    if _FULL in text:
        return DoesNotFit(
            f"the disk of MLflow's database {uri} is full",
            measured=_FULL,
            remedy="Free space there, run `enginery sweep`, or name another database in MLFLOW_TRACKING_URI.",
        )
    said = next((one for one in _UNUSABLE if one in text), None)
    if said is None:
        return None
    return Refused(
        f"MLflow's database {uri} cannot be used",
        measured=said,
        remedy="Give it back its rights, or restore it from a backup. Without one put it aside: artifacts and the "
        "promotion journal are in the store, and the next run of a recipe registers anew what is sealed.",
    )


def _of_s3(error: Exception, uri: str) -> StageError | None:
    """What S3 said of a file that MLflow's client sends there itself."""
    from botocore.exceptions import BotoCoreError, ClientError

    from stages.adapters.s3.client import spoken

    # boto3 hides the server's answer to an upload in an error of its own.
    wrapped = type(error).__module__.startswith(("boto3.", "s3transfer."))
    told = error.__cause__ or error.__context__ if wrapped else error
    if not isinstance(told, BotoCoreError | ClientError):
        return _away(error, uri) if wrapped else None
    try:
        with spoken(f"the files of MLflow at {uri}"):
            raise told
    except StageError as ours:
        return ours
    except (BotoCoreError, ClientError):
        return _refused(error, uri)


def _away(error: Exception, uri: str) -> Unavailable:
    return Unavailable(f"MLflow at {uri} does not answer as it should ({error})", remedy=_REMEDY)


def _refused(error: Exception, uri: str, code: str = "") -> Refused:
    refused = Refused(f"MLflow at {uri} refused: {error}")
    refused.code = code
    return refused
