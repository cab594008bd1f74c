"""A real S3 server for the tests of what lives in S3."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from stages.adapters.s3 import client as s3_client

BUCKET = "enginery"


def free_ports(count: int) -> list[int]:
    # The server takes each port and the port 10,000 above it for gRPC, so both must be free.
    found: list[int] = []
    for port in range(random.SystemRandom().randrange(20000, 45000), 55000):
        if len(found) == count:
            break
        if all(_free(p) for p in (port, port + 10000)):
            found.append(port)
    return found


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a SeaweedFS that lives as long as the session."""
    for _ in range(5):
        with _server(tmp_path_factory.mktemp("seaweed")) as endpoint:
            if endpoint:
                yield endpoint
                return
    raise AssertionError("no S3 server came up in five attempts")


@contextmanager
def _server(folder: Path) -> Iterator[str | None]:
    """Its endpoint, or None where it ended early: another process took one of its ports after they were seen free."""
    master, volume, filer, port = free_ports(4)
    weed = Path(sys.executable).with_name("weed")
    command = [
        weed,
        f"-logdir={folder}",
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-s3",
        f"-s3.port={port}",
    ]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-master.telemetry=false"]
    identities = {"identities": [_identity("any", "Admin"), _identity("reader", "Read", "List")]}
    (folder / "identities.json").write_text(json.dumps(identities))
    command += [f"-s3.config={folder / 'identities.json'}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=200", "-master.volumeSizeLimitMB=64"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            endpoint = f"http://127.0.0.1:{port}"
            yield endpoint if _has_bucket(endpoint, server, folder / "log") else None
        finally:
            server.kill()  # nothing in it outlives the session, and a graceful end takes ten seconds


def _identity(name: str, *actions: str) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": name, "secretKey": name}], "actions": list(actions)}


def _has_bucket(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether the server took its bucket; False where it ended before that."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 0}, request_checksum_calculation="when_required"),
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            return server.poll() is None
        except (BotoCoreError, ClientError):
            if server.poll() is not None:
                return False
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)


@pytest.fixture
def s3_root(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh s3://bucket/prefix, reached by the environment that users set."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    s3_client.client.cache_clear()
    yield f"s3://{BUCKET}/{request.node.name}"
    s3_client.client.cache_clear()
