"""Whatever a library below MLflow raises is one of ours, and says whether another try may help."""

import sqlite3

import boto3  # noqa: F401 - as in a process that keeps MLflow's files in S3
import botocore.exceptions
import pytest
import requests
import sqlalchemy
import urllib3
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED, TEMPORARILY_UNAVAILABLE

from flows.tracking.errors import Refused, answered
from stages.runtime.contract import DoesNotFit, StageError, Unavailable
from tests.flows.tracking.broken import broken


def client_error(status, code="x"):
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def upload_error(error):
    from boto3.exceptions import S3UploadFailedError

    made = S3UploadFailedError("Failed to upload a to b")
    made.__context__ = error
    return made


def sqlite(text):
    return sqlalchemy.exc.OperationalError("SELECT", {}, sqlite3.OperationalError(text))


def http_error(status):
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError("no", response=answer)


ERRORS = [
    (MlflowException("connection lost"), Unavailable),
    (MlflowException("too many", error_code=RESOURCE_EXHAUSTED), Unavailable),
    (MlflowException("no such", error_code=1000), Refused),
    (requests.ConnectionError("refused"), Unavailable),
    (requests.ReadTimeout("slow"), Unavailable),
    (http_error(502), Unavailable),
    (http_error(403), Refused),
    (urllib3.exceptions.ProtocolError("cut"), Unavailable),
    (sqlalchemy.exc.OperationalError("SELECT", {}, Exception("locked")), Unavailable),
    (sqlalchemy.exc.ProgrammingError("SELECT", {}, Exception("no such table")), Refused),
    (sqlite("database is locked"), Unavailable),
    (sqlite("database or disk is full"), DoesNotFit),
    (sqlite("attempt to write a readonly database"), Refused),
    (MlflowException(str(sqlite("database or disk is full")), error_code=TEMPORARILY_UNAVAILABLE), DoesNotFit),
    (sqlalchemy.exc.DatabaseError("SELECT", {}, sqlite3.DatabaseError("file is not a database")), Refused),
    (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"), Unavailable),
    (botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3"), Unavailable),
    (botocore.exceptions.NoCredentialsError(), StageError),
    (botocore.exceptions.ParamValidationError(report="no"), StageError),
    (client_error(503, "SlowDown"), Unavailable),
    (client_error(403, "AccessDenied"), StageError),
    (client_error(400, "InvalidRequest"), StageError),
    (upload_error(client_error(500)), Unavailable),
    (upload_error(client_error(403)), StageError),
    (upload_error(None), Unavailable),
    (OSError(28, "No space left on device"), OSError),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=[f"{type(e).__name__}-{i}" for i, (e, _) in enumerate(ERRORS)])
def test_answered_tells_a_refusal_from_an_outage(error, kind):
    with pytest.raises(kind) as caught, answered("u"):
        raise error
    assert type(caught.value) is kind
    told = caught.value.__cause__ or caught.value
    assert error in (told, next((one for one, _ in ERRORS if one.__context__ is told), None))


def test_client_gives_ours_for_every_call(tracking):
    with pytest.raises(Refused) as caught:
        tracking.client.get_run("0" * 32)
    assert caught.value.code == "RESOURCE_DOES_NOT_EXIST" and tracking.uri in str(caught.value)
    with broken("log_artifact", upload_error(client_error(500))), pytest.raises(Unavailable):
        tracking.client.log_artifact("0" * 32, __file__)
