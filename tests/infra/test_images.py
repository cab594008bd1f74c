"""The images' files, read without a Docker engine."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from stages.runtime.contract import Image

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
OURS = {name: one for name, one in COMPOSE["services"].items() if one["image"].startswith("enginery/")}


@pytest.mark.parametrize("name", [*Image, "server"])
def test_image_has_a_dockerfile_and_an_extra_and_does_not_run_as_root(name):
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    assert name in PROJECT["optional-dependencies"]
    final = text[text.rindex("FROM ") :]
    assert re.findall(r"^USER (\S+)$", final, re.MULTILINE)[-1:] == ["enginery"]
    for label in ("version", "revision"):
        assert f"org.opencontainers.image.{label}=" in final
    assert f"wanted/{name}.txt" in text
    assert "--constraint constraints.txt" in text


def test_requirements_of_an_image_are_those_of_the_project_and_its_extra():
    command = ["python3", "docker/requirements.py", "tensorrt"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert said == [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tensorrt"]]


def test_every_requirement_is_pinned_in_constraints():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    # The bench's peers want older libraries, in an environment of their own.
    extras = {name: said for name, said in PROJECT["optional-dependencies"].items() if name != "peers"}
    for said in [*PROJECT["dependencies"], *(one for names in extras.values() for one in names)]:
        name = re.split(r"[\[<>=]", said)[0].lower().replace("_", "-")
        assert name in pinned or name == "enginery", name


def test_version_of_the_images_is_that_of_the_project():
    version = PROJECT["version"]
    files = [
        *(ROOT / "infra" / "pools").glob("*.json"),
        ROOT / "infra" / "compose.yaml",
        ROOT / "flows" / "running" / "placement.py",
    ]
    for path in files:
        found = re.findall(r"enginery/(?:\{image\}|\w+):([\w.]+)", path.read_text())
        assert found and set(found) == {version}, path


@pytest.mark.parametrize("name", OURS)
def test_service_of_ours_is_bare(name):
    one = OURS[name]
    assert one["read_only"]
    assert one["cap_drop"] == ["ALL"]
    assert "user" not in one


def test_compose_keeps_databases_and_stages_from_the_outside():
    networks = COMPOSE["networks"]
    assert networks["backend"]["internal"] and networks["stages"]["internal"]
    for name in ("postgres", "redis"):
        assert COMPOSE["services"][name]["networks"] == ["backend"]
    published = [port for one in COMPOSE["services"].values() for port in one.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", ["prefect", "mlflow", "postgres", "redis", "s3"])
def test_service_that_serves_has_a_health_check(name):
    assert COMPOSE["services"][name]["healthcheck"]["test"]


def test_example_environment_holds_no_usable_secret_and_env_script_fills_each(tmp_path):
    example = (ROOT / "infra" / ".env.example").read_text()
    empty = re.findall(r"^([A-Z0-9_]+)=$", example, re.MULTILINE)
    assert {"POSTGRES_PASSWORD", "PREFECT_AUTH", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_KEY"} <= set(
        empty
    )
    (tmp_path / ".env.example").write_text(example)
    script = tmp_path / "env.sh"
    script.write_text((ROOT / "infra" / "env.sh").read_text())
    shell = {**os.environ, "DOCKER_SOCKET": str(tmp_path / "nowhere")}
    refused = subprocess.run(["sh", script], capture_output=True, text=True, env=shell)
    assert refused.returncode and "DOCKER_SOCKET" in refused.stderr and not (tmp_path / ".env").exists()
    shell["DOCKER_SOCKET"] = str(script)
    for _ in range(2):
        subprocess.run(["sh", script], check=True, capture_output=True, env=shell)
    made = dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", (tmp_path / ".env").read_text(), re.MULTILINE))
    assert made.keys() == dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", example, re.MULTILINE)).keys()
    secrets = [value for name, value in made.items() if name in empty and name not in ("DOCKER_GID", "SHARDS", "POOLS")]
    assert all(len(value) >= 40 for value in secrets) and len(set(secrets)) == len(secrets)
    assert made["DOCKER_GID"] == str(script.stat().st_gid)
    assert (tmp_path / ".env").stat().st_mode & 0o77 == 0


def test_images_hold_no_secret_of_the_tree():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"infra/.env*", "infra/kubernetes/secrets/*.env"} <= set(ignored)


@pytest.mark.parametrize("pool", ["flows", "cpu", "gpu"])
def test_job_template_is_bare_and_only_the_gpu_pool_asks_for_a_gpu(pool):
    read = json.loads((ROOT / "infra" / "pools" / f"docker-{pool}.json").read_text())
    made = read["job_configuration"]["container_create_kwargs"]
    assert made["read_only"] and made["cap_drop"] == ["ALL"] and made["security_opt"] == ["no-new-privileges:true"]
    assert not read["job_configuration"]["privileged"]
    assert ("device_requests" in made) == (pool == "gpu")
    assert "mem_limit" in read["job_configuration"]


def test_stage_containers_get_no_credential_of_mlflow():
    for pool in ("cpu", "gpu"):
        assert "MLFLOW" not in (ROOT / "infra" / "pools" / f"docker-{pool}.json").read_text()


def test_deployments_of_prefect_yaml_can_all_be_loaded():
    from prefect.flows import load_flow_from_entrypoint

    said = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())
    names = {f"{load_flow_from_entrypoint(one['entrypoint']).name}/{one['name']}" for one in said["deployments"]}
    assert names == {
        "run-stage/cpu",
        "run-stage/gpu",
        "optimize/scheduled",
        "optimize/on-checkpoint",
        "watch/checkpoints",
        "promote/promote",
        "rollback/rollback",
        "sweep/weekly",
    }
