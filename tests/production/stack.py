"""The production stack for its test: brought up from nothing by the README's own commands, and taken down again."""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import boto3
import httpx
from botocore.config import Config

ROOT = Path(__file__).parents[2]
BUCKET = "enginery"
NAMED = ("ENGINERY_STACK", "ENGINERY_PREFECT_PORT", "ENGINERY_MLFLOW_PORT", "ENGINERY_S3_PORT")
KEPT = os.environ.get("ENGINERY_TEST_STACK", "")
"""For work on the tests themselves: the environment file of a stack that is up, to be used and left."""


@cache
def chosen() -> Mapping[str, str]:
    """What makes the stack one of its own, beside whatever stands here: its environment file, its name, its ports."""
    if KEPT:
        file = ROOT / KEPT
        return {"ENV_FILE": str(file), **{name: settings(str(file))[name] for name in NAMED}}
    file = Path(tempfile.mkdtemp(prefix="enginery-test-")) / "stack.env"
    values = (f"enginery-test-{secrets.token_hex(4)}", *map(str, free_ports(3)))
    return {"ENV_FILE": str(file), **dict(zip(NAMED, values, strict=True))}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that the kernel gives to clients while images are built."""
    found = []
    for port in random.sample(range(20000, 32000), 200):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} ports are free between 20000 and 32000")


def run(*command: str, timeout: float = 1200, env: Mapping[str, str] | None = None) -> str:
    """A command at the root of the project, for this stack and no other; its output."""
    # What the make above was told would be told to the make below, before the environment.
    around = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**around, **chosen(), **(env or {})},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{said[-6000:]}"
    return said


def why_not() -> str:
    """Why the stack cannot be had here; empty where it can."""
    try:
        asked = subprocess.run(["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no docker command"
    return "" if asked.returncode == 0 and asked.stdout.strip() else "no Docker engine answers"


def setting(name: str) -> str:
    """What the stack's environment file says."""
    return settings(chosen()["ENV_FILE"])[name]


def settings(file: str) -> dict[str, str]:
    """An environment file's variables, the example's where it does not name them."""
    texts = [one.read_text(encoding="utf-8") for one in (ROOT / "infra" / ".env.example", Path(file))]
    return dict(line.split("=", 1) for line in "\n".join(texts).splitlines() if re.match(r"\w+=", line))


def name() -> str:
    """The stack's name."""
    return setting("ENGINERY_STACK")


def url(service: str) -> str:
    """Where this machine reaches prefect, mlflow or s3."""
    return f"http://127.0.0.1:{setting(f'ENGINERY_{service.upper()}_PORT')}"


def readme_commands() -> list[str]:
    """The commands of the README's production section, word for word: up, submit, watch, down."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Production") :]
    block = section[section.index("```bash\n") + 8 : section.index("```\n\nPrefect")]
    return [line.partition("#")[0].strip() for line in block.strip().splitlines()]


@contextmanager
def up() -> Iterator[None]:
    """The stack, from the README's first command to its last, which leaves nothing of it."""
    if KEPT:
        yield
        return
    # A run that is cancelled takes its stack down, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(*readme_commands()[0].split())
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        try:
            run(*readme_commands()[3].split(), env={"VOLUMES": "--volumes"})
            left = remains()
        finally:
            remove()
            shutil.rmtree(Path(chosen()["ENV_FILE"]).parent)
    assert not left, f"`{readme_commands()[3]}` left {left}"


def remains() -> dict[str, list[str]]:
    """What there is of the stack on this machine: kind -> names or ids."""
    stack = chosen()["ENGINERY_STACK"]

    def containers(which: str) -> list[str]:
        return run("docker", "ps", "--all", "--quiet", f"--filter={which}").split()

    def named(kind: str) -> list[str]:
        names = run("docker", kind, "ls", "--format", "{{.Name}}").split()
        return [one for one in names if one.startswith(f"{stack}-")]

    # Stages' containers are the workers', not Compose's; all of them have the stack's scratch.
    found = {
        "container": containers(f"label=com.docker.compose.project={stack}") + containers(f"volume={stack}-scratch"),
        "network": named("network"),
        "volume": named("volume"),
    }
    return {kind: sorted(set(names)) for kind, names in found.items() if names}


def remove() -> None:
    """Remove what there is of the stack, however it came to be left."""
    # A container's volumes without a name go with it.
    for *command, kind in (("rm", "--force", "--volumes", "container"), ("rm", "network"), ("rm", "--force", "volume")):
        for one in remains().get(kind, []):
            subprocess.run(["docker", kind, *command, one], check=False, capture_output=True)
    assert not remains(), remains()


def environment() -> dict[str, str]:
    """What a user's shell has who works with the stack from its machine."""
    return {
        "AWS_ENDPOINT_URL": url("s3"),
        "AWS_ACCESS_KEY_ID": "enginery",
        "AWS_SECRET_ACCESS_KEY": setting("S3_SECRET_KEY"),
        "AWS_REGION": "us-east-1",
        "PREFECT_API_URL": f"{url('prefect')}/api",
        "PREFECT_API_AUTH_STRING": setting("PREFECT_AUTH"),
        "MLFLOW_TRACKING_URI": url("mlflow"),
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": setting("MLFLOW_ADMIN_PASSWORD"),
        "ENGINERY_STACK": name(),
        "ENGINERY_STORE": f"s3://{BUCKET}/store",
        "ENGINERY_THREADS": setting("THREADS"),
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
    user, password = setting("PREFECT_AUTH").split(":", 1)
    answer = httpx.request(
        method, f"{url('prefect')}/api{path}", json=body, auth=(user, password), timeout=60
    ).raise_for_status()
    return answer.json() if answer.content else None


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
    labels = (f"com.docker.compose.project={name()}", f"com.docker.compose.service={service}")
    return run("docker", "ps", "-aq", *(f"--filter=label={one}" for one in labels)).strip()
