"""The Kubernetes manifests and job templates against schemas, Pod Security, and each other."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flows.running.placement import load_pools
from stages import STAGES
from tests.infra.manifests import (
    INFRA,
    KUBERNETES,
    OVERLAYS,
    POOLS,
    ROOT,
    Resource,
    built,
    containers_of,
    job_of,
    kustomize,
    of_kind,
    pods_of,
    selects,
    validate,
    variables_of,
)
from tests.infra.pod_security import violations


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_built_by_kustomize_matches_the_schemas(overlay: str) -> None:
    for one in built(overlay):
        validate(one)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "enginery", one["metadata"]["name"]


def test_schemas_of_a_misspelt_field_refuse() -> None:
    broken = copy.deepcopy(of_kind("cpu", "Deployment")[0])
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Never"

    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        validate(broken)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "variables",
    [{}, {"name": "one", "image": "enginery/torch:0.1.0", "memory_bytes": 2**33, "seconds": 7200, "env": {"A": "1"}}],
)
def test_job_of_a_pool_made_by_prefect_matches_the_schemas(pool: str, variables: dict[str, Any]) -> None:
    job = job_of(pool, **variables)
    pod = job["spec"]["template"]["spec"]

    # Prefect asks for these two in the pod's spec, where Kubernetes knows none of them and drops them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    validate(job)
    assert (pod["restartPolicy"], job["spec"]["backoffLimit"]) == ("Never", 0)
    assert job["metadata"]["namespace"] == "enginery"
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert pod.get("activeDeadlineSeconds") == variables.get("seconds")
    container = pod["containers"][0]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["image"] == variables.get("image", container["image"])
    if variables:
        assert container["resources"]["limits"]["memory"] == variables["memory_bytes"]
        assert {"name": "A", "value": "1"} in container["env"]
        assert job["metadata"]["generateName"] == "one-"


def test_own_overlay_of_the_readme_replaces_the_services_of_base(copied: Path) -> None:
    own = copied / "overlays" / "own"
    own.mkdir()
    example = (KUBERNETES / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (own / "kustomization.yaml").write_text(example, encoding="utf-8")

    built = list(yaml.safe_load_all(kustomize(own)))

    for one in built:
        validate(one)
    names = {(one["kind"], one["metadata"]["name"]) for one in built}
    gone = {(kind, name) for kind in ("StatefulSet", "Service") for name in ("postgres", "redis", "s3")}
    assert not names & gone and ("Deployment", "mlflow") in names
    text = yaml.safe_dump_all(built)
    assert "registry.example.com/enginery/server" in text and "image: enginery/" not in text
    assert not re.search(r"http://s3:8333|_HOST: (postgres|redis)", text)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_of_an_overlay_and_its_jobs_pass_pod_security_restricted(overlay: str) -> None:
    found = {name: violations(pod) for name, _, pod in pods_of(overlay)}

    assert {name: what for name, what in found.items() if what} == {}
    (namespace,) = of_kind(overlay, "Namespace")
    for mode in ("enforce", "audit", "warn"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("pod", {"hostNetwork": True}),
        ("pod", {"volumes": [{"name": "node", "hostPath": {"path": "/"}}]}),
        ("pod", {"securityContext": {"runAsNonRoot": True}}),
        ("pod", {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}),
        ("context", {"privileged": True}),
        ("context", {"allowPrivilegeEscalation": True}),
        ("context", {"capabilities": {"drop": ["NET_RAW"]}}),
        ("context", {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}),
        ("context", {"runAsUser": 0}),
        ("context", {"runAsNonRoot": False}),
        ("context", {"seccompProfile": {"type": "Unconfined"}}),
        ("container", {"ports": [{"containerPort": 80, "hostPort": 80}]}),
        ("container", {"securityContext": None}),
    ],
)
def test_pod_security_of_a_pod_that_asks_for_more_refuses(where: str, change: Resource) -> None:
    pod = copy.deepcopy(job_of("cpu")["spec"]["template"]["spec"])
    container = pod["containers"][0]
    assert violations(pod) == []

    {"pod": pod, "container": container, "context": container["securityContext"]}[where].update(change)

    assert violations(pod)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_hold_a_read_only_root_bounded_memory_and_no_needless_token(overlay: str) -> None:
    for name, _, pod in pods_of(overlay):
        is_worker = name.startswith("worker-")
        assert pod["automountServiceAccountToken"] is is_worker, name
        assert pod["serviceAccountName"] == ("enginery-worker" if is_worker else "enginery-stage"), name
        for container in containers_of(pod):
            where = f"{name}: {container['name']}"
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, where
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounted) <= {v["name"] for v in pod["volumes"]} | {"data"}, where
            assert "/tmp" in mounted.values(), where
            resources = container["resources"]
            assert resources["limits"]["memory"] and resources["requests"]["memory"] and resources["requests"]["cpu"]
            if container["image"].startswith("enginery/"):
                assert "/scratch" in mounted.values(), where
                # The Service `mlflow` would set MLFLOW_PORT=tcp://..., which is a setting of MLflow's.
                assert pod["enableServiceLinks"] is False, where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_of_an_overlay_all_hit_something(overlay: str, secrets: dict[str, dict[str, str]]) -> None:
    pods = list(pods_of(overlay))
    jobs = [labels for name, labels, _ in pods if name.startswith("job of")]
    for service in of_kind(overlay, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        (pod,) = [pod for _, labels, pod in pods if selects(selector, labels)]
        ports = {port["name"] for port in pod["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
        assert not any(selects(selector, labels) for labels in jobs)
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert any(selects(policy["spec"]["podSelector"], labels) for _, labels, _ in pods), policy["metadata"]["name"]
    maps = {one["metadata"]["name"] for one in of_kind(overlay, "ConfigMap")}
    accounts = {one["metadata"]["name"] for one in of_kind(overlay, "ServiceAccount")}
    for name, _, pod in pods:
        assert pod["serviceAccountName"] in accounts, name
        assert {v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v} <= maps, name
        for container in containers_of(pod):
            variables_of(overlay, container, secrets)  # every map, secret and key is there


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_of_an_overlay_and_its_jobs_are_pinned_and_replaceable(overlay: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    named = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text(encoding="utf-8"))["images"]
    replaceable = {f"{one['name']}:{one['newTag']}" for one in named}
    for name, _, pod in pods_of(overlay):
        for image in (container["image"] for container in containers_of(pod)):
            assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), image
            assert image.endswith(f":{version}") or not image.startswith("enginery/")
            assert image in replaceable or name.startswith("job of"), image


def test_worker_account_may_start_jobs_in_its_namespace_and_nothing_else() -> None:
    assert not of_kind("gpu", "ClusterRole", "ClusterRoleBinding")
    (role,) = of_kind("gpu", "Role")
    (binding,) = of_kind("gpu", "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == ["enginery-worker"]
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {resource for resource, _ in allowed} == {"jobs", "pods", "pods/log", "events"}
    assert {verb for resource, verb in allowed if resource != "jobs"} == {"get", "list", "watch"}
    assert {"create", "delete", "get", "list", "watch"} <= {verb for resource, verb in allowed if resource == "jobs"}


def test_cpu_overlay_and_its_jobs_name_no_gpu() -> None:
    assert "nvidia" not in yaml.safe_dump_all(built("cpu"))
    for pool in ("flows", "cpu"):
        assert "nvidia" not in (INFRA / "pools" / f"kubernetes-{pool}.json").read_text(encoding="utf-8")


def test_gpu_overlay_and_its_jobs_ask_for_a_gpu_and_tolerate_its_taint() -> None:
    (quota,) = of_kind("gpu", "ResourceQuota")
    assert quota["spec"]["hard"] == {"requests.nvidia.com/gpu": "1"}
    pod = job_of("gpu", node_selector={"nvidia.com/gpu.product": "NVIDIA-L4"})["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}


@pytest.mark.parametrize(("overlay", "gpus"), [("cpu", "0"), ("gpu", "1")])
def test_pools_that_an_overlay_places_stages_in_have_a_worker(overlay: str, gpus: str, tmp_path: Path) -> None:
    (said,) = [one["data"] for one in of_kind(overlay, "ConfigMap") if one["metadata"]["name"] == "enginery-pools"]
    (tmp_path / "pools.yaml").write_text(said["pools.yaml"], encoding="utf-8")
    pools = load_pools(str(tmp_path / "pools.yaml"))
    served = set()
    for one in of_kind(overlay, "Deployment"):
        command = one["spec"]["template"]["spec"]["containers"][0]["command"]
        if command[:3] == ["prefect", "worker", "start"]:
            served.add(command[command.index("--pool") + 1])
            assert command[command.index("--type") + 1] == "kubernetes"

    assert served == {pools.place(name).pool for name in STAGES} | {"flows"}
    assert {name for name in STAGES if pools.place(name).pool == "gpu"} == (
        {"compile", "validate", "bench"} if overlay == "gpu" else set()
    )
    (setup,) = of_kind(overlay, "Job")
    assert setup["spec"]["template"]["spec"]["containers"][0]["env"] == [{"name": "ENGINERY_GPUS", "value": gpus}]


def test_templates_of_pools_differ_in_nothing_but_image_secrets_and_gpu() -> None:
    flat = {pool: _flat(json.loads((INFRA / "pools" / f"kubernetes-{pool}.json").read_text())) for pool in POOLS}
    differ = {
        pool: {path for path in flat[pool].keys() | flat["cpu"].keys() if flat[pool].get(path) != flat["cpu"].get(path)}
        for pool in ("flows", "gpu")
    }

    assert all(re.search(r"/(image|node_selector)/|nvidia|tolerations", path) for path in differ["gpu"])
    assert all(re.search(r"/(image|network|cpu|memory_bytes|envFrom|volume.*)/", path) for path in differ["flows"])


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in _flat(one, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for number, one in enumerate(value) for k, v in _flat(one, f"{path}/{number}").items()}
    return {path: value}
