"""Secrets and environment variables of the Kubernetes manifests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.manifests import INFRA, KUBERNETES, ROOT, configuration_of, kustomize, of_kind, pods_of, variables_of


def test_secrets_before_they_are_generated_are_not_built(tmp_path: Path) -> None:
    shutil.copy(KUBERNETES / "secrets" / "kustomization.yaml", tmp_path)

    with pytest.raises(ValueError, match=r"store\.env"):
        kustomize(tmp_path)


def test_secrets_generated_twice_stay_and_are_random(copied: Path, secrets: dict[str, dict[str, str]]) -> None:
    folder = copied / "secrets"
    before = {path.name: path.read_bytes() for path in folder.glob("*.env")}

    subprocess.run(["sh", folder / "generate"], check=True, timeout=10)

    assert {path.name: path.read_bytes() for path in folder.glob("*.env")} == before
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.env"))
    made = [value for one in secrets.values() for value in one.values() if value not in ("enginery", "admin")]
    assert len(set(made)) == len(made) == 6
    assert all(re.fullmatch(r"(enginery:)?[0-9a-f]{48}", value) for value in made)


def test_tree_holds_no_secret() -> None:
    assert not of_kind("gpu", "Secret")
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "infra/kubernetes/secrets/store.env"], cwd=ROOT, check=False, timeout=10
    )
    assert ignored.returncode == 0
    for path in [*KUBERNETES.rglob("*.yaml"), *(KUBERNETES / "base").glob("*.env"), *(INFRA / "pools").glob("kub*")]:
        said = path.read_text(encoding="utf-8")
        assert not re.search(
            r"(?i:password|access_key|auth_string|secret_key)\s*[:=]\s*[\"']?(?![A-Z_]+\b)[\w-]{6,}", said
        )


_READ_BACK = """
import json, os, sys
from prefect.settings import get_current_settings
from prefect_kubernetes.settings import KubernetesSettings
from prefect_redis.cleanup_queue import RedisWorkerCleanupQueueSettings
from prefect_redis.client import RedisMessagingSettings
roots = {"": get_current_settings, "redis": RedisMessagingSettings, "queue": RedisWorkerCleanupQueueSettings,
         "kubernetes": KubernetesSettings}
found = {}
for name, (root, path) in json.loads(sys.argv[1]).items():
    value = roots[root]()
    for step in path.split("."):
        value = getattr(value, step)
    found[name] = str(getattr(value, "get_secret_value", lambda: value)())
print(json.dumps(found))
"""
_K = "PREFECT_INTEGRATIONS_KUBERNETES_"
_PREFECT = {
    "PREFECT_API_URL": ("", "api.url"),
    "PREFECT_API_AUTH_STRING": ("", "api.auth_string"),
    "PREFECT_API_REQUEST_TIMEOUT": ("", "api.request_timeout"),
    "PREFECT_CLIENT_MAX_RETRIES": ("", "client.max_retries"),
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": ("", "client.retry_extra_codes"),
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": ("", "flows.heartbeat_frequency"),
    "PREFECT_MESSAGING_BROKER": ("", "server.events.messaging_broker"),
    "PREFECT_MESSAGING_CACHE": ("", "server.events.messaging_cache"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": ("", "server.analytics_enabled"),
    "PREFECT_SERVER_API_AUTH_STRING": ("", "server.api.auth_string"),
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": ("", "server.concurrency.lease_storage"),
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": ("", "server.database.connection_url"),
    "PREFECT_SERVER_DOCKET_URL": ("", "server.docket.url"),
    "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": ("", "server.events.causal_ordering"),
    "PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE": ("", "server.worker_channel.cleanup_queue_storage"),
    "PREFECT_SERVER_UI_STATIC_DIRECTORY": ("", "server.ui.static_directory"),
    "PREFECT_UI_API_URL": ("", "server.ui.api_url"),
    "PREFECT_WORKER_HEARTBEAT_SECONDS": ("", "worker.heartbeat_seconds"),
    "PREFECT_WORKER_QUERY_SECONDS": ("", "worker.query_seconds"),
    "PREFECT_REDIS_MESSAGING_HOST": ("redis", "host"),
    "PREFECT_REDIS_MESSAGING_PASSWORD": ("redis", "password"),
    "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_HOST": ("queue", "host"),
    "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_PASSWORD": ("queue", "password"),
    f"{_K}OBSERVER_NAMESPACES": ("kubernetes", "observer.namespaces"),
    f"{_K}WORKER_API_AUTH_STRING_SECRET_NAME": ("kubernetes", "worker.api_auth_string_secret_name"),
    f"{_K}WORKER_API_AUTH_STRING_SECRET_KEY": ("kubernetes", "worker.api_auth_string_secret_key"),
}


def test_variables_named_for_prefect_are_those_that_it_reads(
    secrets: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    given: dict[str, str] = {}
    for name, _, pod in pods_of("gpu"):
        if not name.startswith("job of"):
            for container in pod["containers"]:
                given |= {k: v for k, v in variables_of("gpu", container, secrets).items() if k.startswith("PREFECT_")}
    assert given.keys() == _PREFECT.keys()

    said = subprocess.run(
        [sys.executable, "-c", _READ_BACK, json.dumps(_PREFECT)],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **given},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    read = {name: _plain(value) for name, value in json.loads(said.stdout.splitlines()[-1]).items()}

    assert read == {name: _plain(value) for name, value in given.items()}


def _plain(value: str) -> list[str]:
    return sorted(re.findall(r"[^\s{},']+", value.removesuffix(".0").lower()))


_MLFLOW = """
import json
import mlflow.cli
import mlflow.environment_variables
options = mlflow.cli.server.params
print(json.dumps([[*vars(mlflow.environment_variables), *(one.envvar for one in options)],
                  [name for one in options for name in (*one.opts, *one.secondary_opts)]]))
"""


def test_variables_named_for_mlflow_are_those_that_it_reads(secrets: dict[str, dict[str, str]], tmp_path: Path) -> None:
    (container,) = [pod["containers"][0] for name, _, pod in pods_of("cpu") if name == "mlflow"]
    given = {name for name in variables_of("cpu", container, secrets) if name.startswith("MLFLOW_")}

    said = subprocess.run(
        [sys.executable, "-c", _MLFLOW],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    known, options = json.loads(said.stdout.splitlines()[-1])

    assert len(given) > 10
    assert given - set(known) == set()
    asked = re.findall(r" (--[\w-]+)", container["args"][0])
    assert len(asked) == 3 and set(asked) <= set(options)


# A pod's home may be written to. The server calls itself with PREFECT_SERVER_API_AUTH_STRING. A namespace keeps stacks
# apart, so that none needs a name.
_NAME = {"ENGINERY_STACK"}
_COMPOSE_ONLY = {"prefect": {"PREFECT_HOME", "PREFECT_API_AUTH_STRING"}}
_COMPOSE_ONLY["prefect-services"] = _COMPOSE_ONLY["prefect"]
_SAME_AS = {
    "prefect": "prefect-server",
    "prefect-services": "prefect-services",
    "mlflow": "mlflow",
    "set-up": "setup",
    "cpu-worker": "worker-cpu",
}


def test_variables_of_compose_are_those_of_the_pods(secrets: dict[str, dict[str, str]]) -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))["services"]
    pods = {name: variables_of("cpu", pod["containers"][0], secrets) for name, _, pod in pods_of("cpu")}
    for service, pod in _SAME_AS.items():
        asked = compose[service]["environment"].keys() - _COMPOSE_ONLY.get(service, {"PREFECT_HOME", *_NAME})
        if service == "cpu-worker":  # here it hands the store to containers, there the jobs have it of themselves
            asked = {name for name in asked if not name.startswith("AWS_")}
        assert asked - pods[pod].keys() == set(), service
    for pool in ("flows", "cpu"):
        docker = json.loads((INFRA / "pools" / f"docker-{pool}.json").read_text(encoding="utf-8"))
        (job, *_) = [pods[name] for name in pods if name.startswith(f"job of {pool}")]
        assert docker["variables"]["properties"]["env"]["default"].keys() - job.keys() - _NAME == set(), pool
    assert pods["setup"]["ENGINERY_STORE"] == compose["set-up"]["environment"]["ENGINERY_STORE"]


def test_job_that_a_worker_creates_carries_no_auth_string(
    monkeypatch: pytest.MonkeyPatch, secrets: dict[str, dict[str, str]]
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    (pod,) = [pod for name, _, pod in pods_of("cpu") if name == "worker-cpu"]
    for name, value in variables_of("cpu", pod["containers"][0], secrets).items():
        if "KUBERNETES" in name:
            monkeypatch.setenv(name, value)
    auth = secrets["enginery-prefect"]["PREFECT_API_AUTH_STRING"]

    with temporary_settings({PREFECT_API_AUTH_STRING: auth}):
        created = _created(configuration_of("cpu"))

    variables = {one["name"]: one for one in created["spec"]["template"]["spec"]["containers"][0]["env"]}
    reference = {"name": "enginery-prefect", "key": "PREFECT_API_AUTH_STRING"}
    assert variables["PREFECT_API_AUTH_STRING"]["valueFrom"] == {"secretKeyRef": reference}
    assert auth not in json.dumps(created)


def _created(configuration: Any) -> Any:
    """What a worker sends to the Kubernetes API for a flow run."""
    from kubernetes_asyncio.client import ApiClient, Configuration
    from prefect_kubernetes.worker import KubernetesWorker

    sent: list[bytes] = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(sent[-1])

        def log_message(self, *_: Any) -> None: ...

    async def create(port: int) -> None:
        async with ApiClient(Configuration(host=f"http://127.0.0.1:{port}")) as client:
            await KubernetesWorker(work_pool_name="cpu")._create_job(configuration, client)

    with HTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        asyncio.run(create(server.server_port))
        server.shutdown()
    return json.loads(sent[0])
