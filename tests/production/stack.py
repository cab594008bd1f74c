"""The production stack for its test: brought up from nothing by the README's own commands, and taken down again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import boto3
import httpx
from botocore.config import Config

ROOT = Path(__file__).parents[2]
BUCKET = "enginery"
VOLUMES = ("database", "messages", "objects", "scratch")


def run(*command: str, timeout: float = 1200, env: Mapping[str, str] | None = None) -> str:
    """A command at the root of the project; its output."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **(env or {})},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{said[-6000:]}"
    return said


KEPT = os.environ.get("ENGINERY_STACK") == "running"
"""For work on the tests themselves: use the stack that is up, and leave it."""


def why_not() -> str:
    """Why the stack cannot be had here; empty where it can."""
    if KEPT:
        return ""
    try:
        asked = subprocess.run(["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no docker command"
    if asked.returncode or not asked.stdout.strip():
        return "no Docker engine answers"
    volumes = run("docker", "volume", "ls", "--quiet").split()
    if there := [f"enginery-{name}" for name in VOLUMES if f"enginery-{name}" in volumes]:
        return f"a production stack has its volumes here, which a test must not touch: {', '.join(there)}"
    return ""


def secrets() -> dict[str, str]:
    """What infra/.env says."""
    lines = (ROOT / "infra" / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def readme_commands() -> list[str]:
    """The commands of the README's production section, word for word: up, submit, watch, down."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Production") :]
    block = section[section.index("```bash\n") + 8 : section.index("```\n\nPrefect")]
    return [line.partition("#")[0].strip() for line in block.strip().splitlines()]


@contextmanager
def up() -> Iterator[None]:
    """The stack, from the README's first command to its last, and its volumes' end."""
    if KEPT:
        yield
        return
    mine = not (ROOT / "infra" / ".env").exists()
    try:
        run(*readme_commands()[0].split())
        yield
    finally:
        run(*readme_commands()[3].split(), env={"VOLUMES": "--volumes"})
        if mine:
            (ROOT / "infra" / ".env").unlink()


def environment() -> dict[str, str]:
    """What a user's shell has who works with the stack from its machine."""
    said = secrets()
    return {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:8333",
        "AWS_ACCESS_KEY_ID": "enginery",
        "AWS_SECRET_ACCESS_KEY": said["S3_SECRET_KEY"],
        "AWS_REGION": "us-east-1",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_API_AUTH_STRING": said["PREFECT_AUTH"],
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": said["MLFLOW_ADMIN_PASSWORD"],
        "ENGINERY_STORE": f"s3://{BUCKET}/store",
        "ENGINERY_THREADS": said["THREADS"],
    }


def bucket():
    """A client of the stack's S3."""
    shell = environment()
    return boto3.client(
        "s3",
        endpoint_url=shell["AWS_ENDPOINT_URL"],
        aws_access_key_id=shell["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=shell["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
    )


def upload(folder: Path, prefix: str) -> None:
    """A folder's files below a prefix of the bucket."""
    client = bucket()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


def api(method: str, path: str, body: object = None) -> object:
    """Ask Prefect's server; it may be away for a moment while its database starts again."""
    user, password = secrets()["PREFECT_AUTH"].split(":", 1)
    answer = httpx.request(
        method, f"http://127.0.0.1:4200/api{path}", json=body, auth=(user, password), timeout=60
    ).raise_for_status()
    return answer.json()


def start(deployment: str, **parameters: object) -> str:
    """Start a deployment as its page's button does; the flow run's id."""
    found = api("GET", f"/deployments/name/{deployment}")
    made = api("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})
    return made["id"]


def state(flow_run: str) -> dict:
    """A flow run's state."""
    return api("GET", f"/flow_runs/{flow_run}")["state"]


def runs_of(flow: str) -> list[dict]:
    """Every flow run of a flow, first to last."""
    asked = {"flows": {"name": {"any_": [flow]}}, "limit": 200, "sort": "START_TIME_ASC"}
    return api("POST", "/flow_runs/filter", asked)


def logs(flow_run: str) -> str:
    """What a flow run said."""
    asked = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
    return "\n".join(line["message"] for line in api("POST", "/logs/filter", asked))


def await_end(flow_run: str, timeout_s: float) -> dict:
    """The final state of a flow run."""

    def ended():
        now = state(flow_run)
        return now if now["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    return until(ended, timeout_s, lambda: f"{state(flow_run)}\n{logs(flow_run)}")


def until(ask: Callable[[], object], timeout_s: float, said: Callable[[], object] = lambda: ""):
    """The first answer that is true; a service that is away is asked again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if found := ask():
                return found
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {said()}"
        time.sleep(1)


def database(question: str) -> str:
    """Ask Prefect's PostgreSQL."""
    return run(
        "docker", "exec", container("postgres"), "psql", "-U", "enginery", "-d", "prefect", "-Atc", question
    ).strip()


def container(service: str) -> str:
    """The id of a service's container, stopped or not."""
    label = f"label=com.docker.compose.service={service}"
    return run(
        "docker", "ps", "-aq", "--filter", "label=com.docker.compose.project=enginery", "--filter", label
    ).strip()
