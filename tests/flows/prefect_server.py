"""A real Prefect server for the tests of what only a server does: events, automations, deployments. One a process."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest


class Server:
    """A server on a free port with files of its own, that can be away for a while."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="prefect-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self._port}/api"
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def start(self) -> None:
        """Begin, and wait until it answers."""
        where = ["--host", "127.0.0.1", "--port", str(self._port)]
        command = [Path(sys.executable).with_name("prefect"), "server", "start", *where]
        ours = {
            "PREFECT_HOME": str(self.home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        with (self.home / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=others | ours)
        self._process, deadline = process, time.monotonic() + 120
        while not self._answers():
            assert process.poll() is None and time.monotonic() < deadline, (self.home / "log").read_text()[-2000:]
            time.sleep(0.3)

    def stop(self) -> None:
        """Be away."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End, and leave nothing."""
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health").status_code == 200
        except httpx.TransportError:
            return False


@cache
def started() -> str:
    """The API's address; the server ends with this process."""
    server = Server()
    server.start()
    return server.api


@pytest.fixture
def prefect_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of the server, named in the environment and in this process's settings."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    api = started()
    monkeypatch.setenv("PREFECT_API_URL", api)
    with temporary_settings({PREFECT_API_URL: api}):
        yield api


def events(api: str, name: str) -> list[dict[str, object]]:
    """The events of a name that the server has on record."""
    asked = {"filter": {"event": {"name": [name]}}, "limit": 50}
    found: list[dict[str, object]] = httpx.post(f"{api}/events/filter", json=asked).raise_for_status().json()["events"]
    return found


def runs_of(api: str, deployment: object) -> list[dict[str, object]]:
    """The flow runs of a deployment."""
    asked = {"deployments": {"id": {"any_": [str(deployment)]}}, "limit": 50}
    found: list[dict[str, object]] = httpx.post(f"{api}/flow_runs/filter", json=asked).raise_for_status().json()
    return found


def deployed(recipe: str) -> object:
    """A deployment that no worker runs, with the automation that starts it for a recipe; returns its id."""
    from prefect.client.orchestration import get_client

    from flows.production.automations import apply, on_arrival

    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("optimize")
        made = client.create_deployment(
            flow, f"on-{recipe}", parameters={"recipe": recipe}, enforce_parameter_schema=False
        )
        apply(client, [on_arrival(recipe, made)])
    return made


def eventually(value, seconds: float = 20):  # type: ignore[no-untyped-def]
    """What a function returns once that is true, or in the end."""
    deadline = time.monotonic() + seconds
    while not (found := value()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
