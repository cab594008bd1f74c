"""The images' files, read without a Docker engine."""

import json
import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
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
    extra = "tensorrt" if name == "gpu" else name  # which stands on torch's
    assert extra in PROJECT["optional-dependencies"]
    final = text[text.rindex("FROM ") :]
    assert re.findall(r"^USER (\S+)$", final, re.MULTILINE)[-1:] == ["enginery"]
    for label in ("version", "revision"):
        assert f"org.opencontainers.image.{label}=" in final
    assert f"wanted/{extra}.txt" in text
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


def interpolated(**said):
    """compose.yaml as Compose reads it with these variables."""
    text = (ROOT / "infra" / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda found: said.get(found[1]) or found[2], text))


@pytest.mark.parametrize(
    ("said", "stack", "ports"),
    [
        ({}, "enginery", ("4200", "5000", "8333")),
        (
            {
                "ENGINERY_STACK": "other",
                "ENGINERY_PREFECT_PORT": "4300",
                "ENGINERY_MLFLOW_PORT": "5100",
                "ENGINERY_S3_PORT": "8433",
            },
            "other",
            ("4300", "5100", "8433"),
        ),
    ],
)
def test_compose_takes_every_name_and_port_of_a_stack_from_the_environment(said, stack, ports):
    compose = interpolated(**said)
    for kind in ("volumes", "networks"):
        assert {name: one["name"] for name, one in compose[kind].items()} == {
            name: f"{stack}-{name}" for name in compose[kind]
        }
    published = {name: one["ports"] for name, one in compose["services"].items() if "ports" in one}
    assert published == {
        "prefect": [f"127.0.0.1:{ports[0]}:4200"],
        "mlflow": [f"127.0.0.1:{ports[1]}:5000"],
        "s3": [f"127.0.0.1:{ports[2]}:8333"],
    }
    assert not any("container_name" in one for one in compose["services"].values())
    run = compose["services"]["submit"]["environment"]
    assert run["ENGINERY_STACK"] == stack
    assert run["ENGINERY_PREFECT_PAGES"] == f"http://127.0.0.1:{ports[0]}"
    assert run["ENGINERY_MLFLOW_PAGES"] == f"http://127.0.0.1:{ports[1]}"
    server = compose["services"]["prefect"]["environment"]
    assert server["PREFECT_UI_API_URL"] == f"http://127.0.0.1:{ports[0]}/api"
    allowed = compose["services"]["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert any(fnmatch(f"127.0.0.1:{ports[1]}", one) for one in allowed)


@pytest.mark.parametrize("stack", ["enginery", "other"])
def test_make_works_on_the_stack_that_the_environment_file_names(tmp_path, stack):
    file = tmp_path / "of a stack.env"
    file.write_text("" if stack == "enginery" else f"POSTGRES_PASSWORD=x\nENGINERY_STACK={stack}\n")
    shell = {name: value for name, value in os.environ.items() if name not in ("ENGINERY_STACK", "MAKEFLAGS")}
    for target in ("production-up", "production-submit", "production-watch", "production-down"):
        command = ["make", "--dry-run", "--no-print-directory", target, f"ENV_FILE={file}"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=shell).stdout
        assert set(re.findall(r"--project-name (\S+)", said)) == {stack}
        assert set(re.findall(r"ENGINERY_STACK=(\S+)", said)) == {stack}
        assert set(re.findall(r"--env-file '([^']+)'", said)) == {str(file)}
        assert re.findall(r"volume=(\S+)", said) == ([f"{stack}-scratch"] if target == "production-down" else [])


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
    others = ("DOCKER_GID", "ENGINERY_CPU_STEPS", "SHARDS", "POOLS", "SCHEDULED_RECIPE")
    secrets = [value for name, value in made.items() if name in empty and name not in others]
    assert all(len(value) >= 40 for value in secrets) and len(set(secrets)) == len(secrets)
    assert made["DOCKER_GID"] == str(script.stat().st_gid)
    assert int(made["ENGINERY_CPU_STEPS"]) >= 1
    assert all(made[name] == "" for name in ("SHARDS", "POOLS", "SCHEDULED_RECIPE"))
    assert (tmp_path / ".env").stat().st_mode & 0o77 == 0


def test_env_script_keeps_the_name_and_ports_that_the_environment_gives_and_refuses_what_is_no_name(tmp_path):
    script = ROOT / "infra" / "env.sh"
    given = {"ENGINERY_STACK": "a-second_1", "ENGINERY_PREFECT_PORT": "4300", "ENGINERY_S3_PORT": "8433"}
    shell = {**os.environ, "DOCKER_SOCKET": str(script), "ENGINERY_MLFLOW_PORT": "", **given}
    file = tmp_path / "second.env"
    subprocess.run(["sh", script, file], check=True, capture_output=True, env=shell)
    made = dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", file.read_text(), re.MULTILINE))
    assert {name: made[name] for name in (*given, "ENGINERY_MLFLOW_PORT")} == {**given, "ENGINERY_MLFLOW_PORT": "5000"}
    for wrong in ("Upper", "-dash", "two words", "a.b"):
        shell["ENGINERY_STACK"] = wrong
        refused = subprocess.run(["sh", script, tmp_path / "no.env"], capture_output=True, text=True, env=shell)
        assert refused.returncode and wrong in refused.stderr and not (tmp_path / "no.env").exists()


@pytest.mark.parametrize(
    ("gigabytes", "cores", "steps"), [(64, 16, 6), (64, 8, 4), (28, 16, 2), (16, 8, 1), (4, 1, 1), (None, 8, None)]
)
def test_env_script_lets_as_many_steps_run_as_the_machine_has_memory_and_cores_for(gigabytes, cores, steps, tmp_path):
    tools = {"docker": f"echo {gigabytes}000000000" if gigabytes else "exit 1", "getconf": f"echo {cores}"}
    for name, does in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    script = ROOT / "infra" / "env.sh"
    shell = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DOCKER_SOCKET": str(script)}
    subprocess.run(["sh", script, tmp_path / "made.env"], check=True, capture_output=True, env=shell)
    made = int(re.search(r"^ENGINERY_CPU_STEPS=(.*)$", (tmp_path / "made.env").read_text(), re.MULTILINE)[1])
    most = int(re.search(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1000 / 8e9
    assert made == steps if steps else 1 <= made <= min(most, cores / 2)


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


@pytest.mark.parametrize("pool", ["flows", "cpu", "gpu"])
@pytest.mark.parametrize("stack", ["", "other"])
def test_job_template_names_the_networks_and_the_scratch_of_its_stack(pool, stack, monkeypatch):
    from flows.production.pools import declared
    from flows.production.variables import Shell
    from flows.running.placement import Pools

    monkeypatch.setenv("ENGINERY_STACK", stack)
    name = stack or "enginery"
    made = Shell(os.environ).fill(declared(pool, "docker", 1))
    variables = made["variables"]["properties"]
    assert variables["network"]["default"] == Pools().networks["outside" if pool == "flows" else "inside"]
    assert variables["network"]["default"] == f"{name}-{'outside' if pool == 'flows' else 'stages'}"
    assert variables["volumes"]["default"] == [f"{name}-scratch:/scratch"]
    assert variables["env"]["default"].get("ENGINERY_STACK") == (name if pool == "flows" else None)
    assert "$" not in json.dumps(made)


def test_stage_containers_get_no_credential_of_mlflow():
    for pool in ("cpu", "gpu"):
        assert "MLFLOW" not in (ROOT / "infra" / "pools" / f"docker-{pool}.json").read_text()


def test_deployments_of_prefect_yaml_can_all_be_loaded():
    from prefect.flows import load_flow_from_entrypoint

    from flows.prefect_api import flow_run_tag

    said = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())
    assert all(flow_run_tag.OURS in one["tags"] for one in said["deployments"])
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
