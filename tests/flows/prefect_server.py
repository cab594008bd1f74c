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


@cache
def started() -> str:
    """The API's address; the server ends with this process."""
    home = Path(tempfile.mkdtemp(prefix="prefect-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    ours = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=others | ours)

    def end() -> None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        shutil.rmtree(home, ignore_errors=True)

    atexit.register(end)
    api, deadline = f"http://127.0.0.1:{port}/api", time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"{api}/health").status_code == 200:
                return api
        except httpx.TransportError:
            pass
        assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-2000:]
        time.sleep(0.3)


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
