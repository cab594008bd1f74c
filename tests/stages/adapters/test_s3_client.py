"""Every error of boto3, and of what lies below it, is one of ours: to mend, or to try again."""

from __future__ import annotations

import http.client
import http.server
import inspect
import socket
import string
import threading
import time
from collections.abc import Iterator

import pytest
import urllib3.exceptions
from botocore import exceptions as of_boto

from stages.adapters import s3_store
from stages.adapters.s3 import client as s3_client
from stages.runtime.contract import Interrupted, StageError, Unavailable
from stages.runtime.patience import patiently

_AGAIN = {
    "HTTPClientError",
    "ConnectionError",
    "EndpointConnectionError",
    "SSLError",
    "ConnectionClosedError",
    "ReadTimeoutError",
    "ConnectTimeoutError",
    "ProxyConnectionError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "ChecksumError",
    "FlexibleChecksumError",
    "CapacityNotAvailableError",
}
_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "UnknownCredentialError",
    "NoAuthTokenError",
    "TokenRetrievalError",
    "UnknownTokenProviderError",
    "RefreshWithMFAUnsupportedError",
    "MetadataRetrievalError",
    "ProfileNotFound",
    "SSOError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "LoginError",
    "LoginRefreshRequired",
    "LoginInsufficientPermissions",
    "LoginTokenLoadError",
    "LoginAuthorizationCodeError",
}
_OF_BOTO = sorted(
    (
        kind
        for kind in vars(of_boto).values()
        if inspect.isclass(kind) and issubclass(kind, of_boto.BotoCoreError) and kind.__module__ == of_boto.__name__
    ),
    key=lambda kind: kind.__name__,
)


def made(kind: type[Exception]) -> Exception:
    """An error of a kind, with something for each field of its text."""
    fields = {name for _, name, _, _ in string.Formatter().parse(getattr(kind, "fmt", "")) if name}
    if kind is of_boto.WaiterError:
        fields |= {"last_response"}
    try:
        return kind(**dict.fromkeys(fields, "x"))
    except (TypeError, KeyError):
        return kind(**dict.fromkeys({*fields, "error", "msg", "error_msg"}, "x"))


@pytest.mark.parametrize("kind", _OF_BOTO, ids=lambda kind: kind.__name__)
def test_error_of_boto_is_ours(kind: type[Exception]) -> None:
    assert len(_OF_BOTO) > 90
    with pytest.raises(StageError) as told, s3_client.spoken("s3://bucket/key"):
        raise made(kind)
    assert "s3://bucket/key" in str(told.value)
    assert told.value.remedy
    assert isinstance(told.value, Unavailable) == (kind.__name__ in _AGAIN)
    if kind.__name__ in _CREDENTIALS:
        assert "no credentials" in told.value.what and "AWS_ACCESS_KEY_ID" in told.value.remedy


@pytest.mark.parametrize(
    "error",
    [
        urllib3.exceptions.ProtocolError("Connection broken", ConnectionResetError(104, "reset")),
        urllib3.exceptions.ReadTimeoutError(None, "/", "late"),  # type: ignore[arg-type]
        urllib3.exceptions.SSLError("bad record"),
        urllib3.exceptions.DecodeError("gzip"),
        http.client.IncompleteRead(b"", 7),
        ConnectionResetError(104, "reset"),
        BrokenPipeError(32, "pipe"),
        TimeoutError("late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_a_body_that_is_read_is_tried_again(error: Exception) -> None:
    with pytest.raises(Unavailable, match="s3://bucket/key"), s3_client.spoken("s3://bucket/key"):
        raise error


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (503, "SlowDown", True),
        (500, "InternalError", True),
        (429, "TooManyRequests", True),
        (408, "RequestTimeout", True),
        (400, "RequestTimeout", True),
        (400, "Throttling", True),
        (409, "ConditionalRequestConflict", True),
        (400, "InvalidArgument", False),
        (403, "RequestTimeTooSkewed", False),
        (403, "AccessDenied", False),
        (404, "NoSuchBucket", False),
        (301, "PermanentRedirect", False),
        (400, "AuthorizationHeaderMalformed", False),
        (400, "ExpiredToken", False),
        (400, "400", False),
    ],
)
def test_answer_of_a_server_is_ours(status: int, code: str, again: bool) -> None:
    with pytest.raises(StageError) as told, s3_client.spoken("s3://bucket/key"):
        raise of_boto.ClientError(
            {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
            "GetObject",
        )
    assert isinstance(told.value, Unavailable) == again
    assert code in str(told.value)
    assert again or told.value.remedy
    assert ("AWS_REGION" in str(told.value)) == (
        code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "400", "InvalidArgument")
    )
    assert ("Renew" in str(told.value)) == (code == "ExpiredToken")


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://b/run#1/ckpt", ("b", "run#1/ckpt")),
        ("s3://b/a?x=1/y", ("b", "a?x=1/y")),
        ("s3://b/a%20b/ü/", ("b", "a%20b/ü")),
        ("s3://b", ("b", "")),
    ],
)
def test_key_holds_every_character_that_is_written(uri: str, place: tuple[str, str]) -> None:
    assert s3_client.parse(uri) == place


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3:/b/key", "b/key", "s3://b?x/key"])
def test_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(StageError, match="names no bucket"):
        s3_client.parse(uri)


def test_certificate_that_is_not_trusted_is_for_a_person() -> None:
    with pytest.raises(StageError, match="AWS_CA_BUNDLE") as told, s3_client.spoken("s3://bucket/key"):
        raise of_boto.SSLError(
            endpoint_url="https://s3", error="[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"
        )
    assert not isinstance(told.value, Unavailable)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_client.client.cache_clear()
    yield monkeypatch
    s3_client.client.cache_clear()


@pytest.mark.parametrize(("name", "value"), [("AWS_ENDPOINT_URL", "localhost:8333"), ("AWS_MAX_ATTEMPTS", "many")])
def test_environment_that_is_not_understood_is_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    with pytest.raises(StageError, match=name):
        s3_store.S3Objects("s3://bucket/x").read("key")


def test_server_that_is_away_costs_the_callers_patience_and_no_more(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objects, began = s3_store.S3Objects("s3://bucket/x"), time.monotonic()
    with pytest.raises(Unavailable):
        patiently(lambda: patiently(lambda: objects.read("key"), away_s=1), away_s=1)
    assert time.monotonic() - began < 2
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        patiently(lambda: objects.put("key", b""), away_s=60, stopped=stopped)
    assert time.monotonic() - began < 2


def test_body_that_breaks_off_is_read_again(environment: pytest.MonkeyPatch) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
    bodies = [b"ab", b"abc", b"abcd"]
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            for body in bodies:
                near, _ = door.accept()
                near.recv(1 << 16)
                near.sendall(whole + body)
                near.close()

        threading.Thread(target=serve, daemon=True).start()
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{door.getsockname()[1]}")
        assert s3_store.S3Objects("s3://bucket/x").read("key") == b"abcd"


def test_server_that_redirects_every_request_is_named(environment: pytest.MonkeyPatch) -> None:
    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(301)
            self.send_header("Location", f"https://127.0.0.1{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StageError, match="AWS_ENDPOINT_URL") as told:
            s3_store.S3Objects("s3://bucket/x").read("key")
        server.shutdown()
    assert not isinstance(told.value, Unavailable)
