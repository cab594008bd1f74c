"""Make a Prefect server ready for production: bucket, work pools, limits, deployments, automations.

Everything is made if it is not there and brought up to date if it is, so the same command follows every release.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import yaml

from flows.prefect_api.retry import patiently
from flows.recipe.read import load_recipe
from flows.running.placement import stack_name
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import ROOT

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient

INFRA = ROOT / "infra"
POOLS = ("flows", "cpu", "gpu")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
ON_ARRIVAL = "optimize/on-checkpoint"
Kind = Literal["docker", "kubernetes"]


def deploy(kind: Kind, gpus: int, say: Callable[[str], None]) -> None:
    """Bring the Prefect server of $PREFECT_API_URL up to date.

    Args:
        kind: what the workers start: containers of Docker, or jobs of Kubernetes.
        gpus: GPUs that the gpu pool has; it builds and executes one engine on each at a time. With 0 its containers ask
            for none: engines are compiled ahead of time and not executed.
        say: who is told what was done.

    Raises:
        StageError: no server is named.
        Unavailable: the server does not answer.
    """
    from prefect.client.orchestration import get_client

    from flows.production.automations import apply, standard

    if not os.environ.get("PREFECT_API_URL"):
        raise StageError("`enginery deploy` needs a Prefect server", remedy="Set PREFECT_API_URL.")
    with get_client(sync_client=True) as client:
        for pool in POOLS:
            patiently(partial(_pool, client, pool, kind, gpus), say=say)
            say(f"work pool {pool}: {kind}")
        client.upsert_global_concurrency_limit_by_name("gpu", max(1, gpus))
        say(f"concurrency limit gpu: {max(1, gpus)}")
        _deployments(client, say)
        source = client.read_deployment_by_name(ON_ARRIVAL).parameters["recipe"]
        name = load_recipe(source).name
        wanted = standard(client, name, source=source, deployment=ON_ARRIVAL, pools=POOLS)
        apply(client, wanted)
        for automation in wanted:
            say(f"automation {automation.name}")


def template(pool: str, kind: Kind, gpus: int) -> dict[str, Any]:
    """The base job template of a pool with the stack's name, and `{{ $NAME }}` for what else `deploy` fills in."""
    path = INFRA / "pools" / f"{kind}-{pool}.json"
    if not path.is_file():
        path = INFRA / "pools" / f"{kind}-cpu.json"
    text = path.read_text(encoding="utf-8").replace("{{ $ENGINERY_STACK }}", stack_name())
    read: dict[str, Any] = json.loads(text)
    if pool == "gpu" and not gpus:
        read = _without_gpu(read, kind)
    return read


def _without_gpu(read: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if kind == "docker":
        read["variables"]["properties"]["device_requests"]["default"] = []
        return read
    return template("cpu", kind, 0)


def _pool(client: SyncPrefectClient, name: str, kind: Kind, gpus: int) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    limit = max(1, gpus) if name == "gpu" else None
    filled = _filled(template(name, kind, gpus))
    made = WorkPoolCreate(name=name, type=kind, base_job_template=filled, concurrency_limit=limit)
    client.create_work_pool(made, overwrite=True)


def _filled(read: dict[str, Any]) -> dict[str, Any]:
    """The template with this environment's values; secrets as references to blocks, which the server encrypts."""
    from prefect.blocks.system import Secret

    env = read["variables"]["properties"]["env"].get("default", {})
    for name, value in env.items():
        if value != f"{{{{ ${name} }}}}":
            continue
        env[name] = os.environ.get(name, "")
        if name in _SECRETS:
            block = f"enginery-{name.lower().replace('_', '-')}"
            Secret(value=env[name]).save(block, overwrite=True)
            env[name] = f"{{{{ prefect.blocks.secret.{block} }}}}"
    return read


def _deployments(client: SyncPrefectClient, say: Callable[[str], None]) -> None:
    # `prefect deploy` reads the same file; 3.8.8 asks for a pool's workers in a way that its own server refuses.
    text = (INFRA / "prefect.yaml").read_text(encoding="utf-8")
    said = yaml.safe_load(re.sub(r"\{\{ \$(\w+) \}\}", lambda found: os.environ.get(found[1], ""), text))
    for one in said["deployments"]:
        say(f"deployment {_deployment(client, one, said['pull'])}")


def _deployment(client: SyncPrefectClient, declared: Mapping[str, Any], pull: list[dict[str, Any]]) -> str:
    """Make or update one deployment; a schedule that a person switched on or off stays as it is."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyOptions
    from prefect.exceptions import ObjectNotFound
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Flow[Any, Any] = load_flow_from_entrypoint(declared["entrypoint"])
    name = f"{flow.name}/{declared['name']}"
    try:
        stands = {one.slug: one.active for one in client.read_deployment_by_name(name).schedules}
    except ObjectNotFound:
        stands = {}
    schedules = []
    for one in declared.get("schedules", []):
        when = {key: one[key] for key in ("cron", "timezone", "interval", "rrule") if key in one}
        active = stands.get(one["slug"], one["active"])
        schedules.append(DeploymentScheduleCreate(schedule=when, active=active, slug=one["slug"]))
    limit = (
        ConcurrencyLimitConfig.model_validate(declared["concurrency_limit"])
        if "concurrency_limit" in declared
        else None
    )
    client.create_deployment(
        client.create_flow_from_name(flow.name),
        declared["name"],
        schedules=schedules,
        concurrency_limit=limit.limit if limit else None,
        concurrency_options=ConcurrencyOptions(collision_strategy=limit.collision_strategy) if limit else None,
        parameters=declared.get("parameters", {}),
        description=declared["description"],
        tags=declared["tags"],
        work_pool_name=declared["work_pool"]["name"],
        job_variables=declared["work_pool"].get("job_variables"),
        entrypoint=declared["entrypoint"],
        path=str(ROOT),
        pull_steps=pull,
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        enforce_parameter_schema=True,
    )
    return name


def make_bucket(uri: str) -> bool:
    """Make the bucket of an S3 store; False when it stands already or the store is no bucket's."""
    from stages.adapters.s3_bucket import ensure_bucket

    return uri.startswith("s3://") and ensure_bucket(uri)
