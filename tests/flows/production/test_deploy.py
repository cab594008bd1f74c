"""`enginery deploy` on a real server: what is declared and differs is changed, and what an operator set stays."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate, GlobalConcurrencyLimitUpdate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

from flows.production.deploy import deploy
from flows.production.deployments import all_declared
from flows.production.pools import POOLS, Size
from flows.production.variables import SECRETS, Shell, block_name
from stages.runtime.contract import StageError
from tests.flows.prefect_server import prefect_api

ROOT = Path(__file__).parents[3]
FULL = {
    "AWS_ACCESS_KEY_ID": "enginery",
    "AWS_SECRET_ACCESS_KEY": "first-key",
    "AWS_ENDPOINT_URL": "http://s3:8333",
    "ENGINERY_STACK": "other",
    "ENGINERY_STORE": "s3://bucket/store",
    "ENGINERY_GPUS": "0",
    "ENGINERY_CPU_STEPS": "3",
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "MLFLOW_TRACKING_PASSWORD": "first-password",
    "ARRIVAL_URI": "s3://bucket/checkpoints",
    "ARRIVAL_RECIPE": "tiny",
}


@pytest.fixture
def client(prefect_api):
    """A client of the server, on which nothing of ours stands before and after."""
    with get_client(sync_client=True) as made:
        bare(made)
        yield made
        bare(made)


def bare(client):
    for name in POOLS:
        absent(client.delete_work_pool, name)
    for name in SECRETS:
        try:
            found = client.read_block_document_by_name(block_name(name), "secret")
        except ObjectNotFound:
            continue
        client.delete_block_document(found.id)
    absent(client.delete_global_concurrency_limit_by_name, "gpu")
    for one in all_declared():
        try:
            client.delete_deployment(client.read_deployment_by_name(one.name).id)
        except ObjectNotFound:
            continue
    for one in ours(client):
        client.delete_automation(one.id)


def absent(delete, name):
    try:
        delete(name)
    except ObjectNotFound:
        pass


def ours(client):
    # The tests beside these have the same automations for pools and recipes of other names.
    names = {"enginery: crash lost runs", "enginery: run tiny on arrival"}
    names |= {f"enginery: work pool {pool} is stuck" for pool in POOLS}
    return [one for name in names for one in client.read_automations_by_name(name)]


def deployed(shell, *, kind="docker", gpus=None, steps=None, dry=False):
    said = []
    deploy(kind, Size.told(shell, gpus, steps), Shell(shell), "", said.append, dry=dry)
    return said


def everything(client):
    """All that stands, but for when it was seen or changed last."""
    found = {
        "pools": [client.read_work_pool(name) for name in POOLS],
        "secrets": [client.read_block_document_by_name(block_name(name), "secret") for name in SECRETS],
        "limits": client.read_global_concurrency_limits(limit=200),
        "deployments": [client.read_deployment_by_name(one.name) for one in all_declared()],
        "automations": ours(client),
    }
    text = json.dumps({kind: [one.model_dump() for one in many] for kind, many in found.items()}, default=str)
    return without(json.loads(text), {"updated", "last_polled", "status", "updated_by"})


def without(value, names):
    if isinstance(value, dict):
        return {key: without(one, names) for key, one in value.items() if key not in names}
    return [without(one, names) for one in value] if isinstance(value, list) else value


def env_of(client, pool):
    return client.read_work_pool(pool).base_job_template["variables"]["properties"]["env"]["default"]


def test_deploy_again_from_any_shell_changes_nothing_and_loses_nothing_that_an_operator_set(client):
    said = deployed(FULL)
    assert said[-1] == "19 changed, 0 as they were"
    limits = {name: client.read_work_pool(name).concurrency_limit for name in POOLS}
    assert limits == {"flows": 8, "cpu": 3, "gpu": 1}
    assert deployed(FULL) == ["nothing to change: 19 as they were"]

    client.update_work_pool("cpu", WorkPoolUpdate(concurrency_limit=5, is_paused=True))
    client.update_global_concurrency_limit("gpu", GlobalConcurrencyLimitUpdate(limit=4, active=False))
    nightly = client.read_deployment_by_name("optimize/scheduled")
    client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True)
    client.update_deployment(
        nightly.id,
        DeploymentUpdate(
            parameters={"recipe": "smollm2-135m"}, tags=[*nightly.tags, "mine"], paused=True, concurrency_limit=2
        ),
    )
    for one in ours(client):
        client.pause_automation(one.id)
    template = client.read_work_pool("flows").base_job_template
    template["variables"]["properties"]["env"]["default"]["HTTPS_PROXY"] = "http://proxy:3128"
    client.update_work_pool("flows", WorkPoolUpdate(base_job_template=template))
    before = everything(client)

    without_variables = deployed({})
    assert without_variables[1:] == ["nothing to change: 19 as they were"]
    assert without_variables[0].startswith("not set here, and kept as they stand: ARRIVAL_RECIPE, ARRIVAL_URI, AWS_")
    assert not any(value in without_variables[0] for value in FULL.values() if len(value) > 5)
    assert everything(client) == before
    assert deployed(FULL) == [
        "not set here, and kept as they stand: SCHEDULED_RECIPE",
        "nothing to change: 19 as they were",
    ]
    assert deployed({name: "" for name in FULL})[1:] == ["nothing to change: 19 as they were"]
    assert everything(client) == before
    assert not any(one.enabled for one in ours(client))


def test_dry_run_says_exactly_what_differs_and_changes_nothing(client):
    said = deployed(FULL, dry=True)
    assert said[-1] == "19 would change, 0 as they were"
    assert "work pool cpu: missing -> docker, 3 at once" in said
    with pytest.raises(ObjectNotFound):
        client.read_work_pool("cpu")

    deployed(FULL)
    template = client.read_work_pool("cpu").base_job_template
    template["variables"]["properties"]["image"]["default"] = "enginery/torch:0.0.1"
    client.update_work_pool("cpu", WorkPoolUpdate(base_job_template=template, is_paused=True))
    (stuck,) = client.read_automations_by_name("enginery: work pool gpu is stuck")
    client.delete_automation(stuck.id)
    sweep = client.read_deployment_by_name("sweep/weekly")
    client.update_deployment(sweep.id, DeploymentUpdate(description="Sweeps.", tags=["store"]))
    before = everything(client)
    shell = {**FULL, "MLFLOW_TRACKING_PASSWORD": "second-password", "MLFLOW_TRACKING_URI": "http://u:p@new:5000"}
    said = deployed(shell, dry=True)
    assert sorted(said[:-1]) == sorted(
        [
            "secret enginery-mlflow-tracking-password: set -> changed",
            "work pool cpu, template.variables.properties.image.default: enginery/torch:0.0.1 -> enginery/torch:0.1.0",
            "work pool flows, template.variables.properties.env.default.MLFLOW_TRACKING_URI: "
            "http://mlflow:5000 -> http://***@new:5000",
            "deployment sweep/weekly, description: Sweeps. -> "
            "Removes drafts, interrupted uploads and files that no artifact names.",
            'deployment sweep/weekly, tags: ["store"] -> ["enginery", "store"]',
            "automation enginery: work pool gpu is stuck: missing -> on",
        ]
    )
    assert said[-1] == "5 would change, 14 as they were"
    assert everything(client) == before
    assert deployed(shell)[-1] == "5 changed, 14 as they were"
    assert deployed(shell, dry=True) == ["nothing to change: 19 as they were"]
    assert client.read_work_pool("cpu").is_paused


def test_empty_secrets_on_a_fresh_server_are_refused_together_before_anything_stands(client):
    shell = {**FULL, "AWS_SECRET_ACCESS_KEY": "", "ARRIVAL_RECIPE": ""}
    del shell["MLFLOW_TRACKING_PASSWORD"]
    for dry in (True, False):
        with pytest.raises(StageError) as refused:
            deployed(shell, dry=dry)
        assert "ARRIVAL_RECIPE, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD" in str(refused.value)
        for name in POOLS:
            with pytest.raises(ObjectNotFound):
                client.read_work_pool(name)
        with pytest.raises(ObjectNotFound):
            client.read_block_document_by_name(block_name("AWS_SECRET_ACCESS_KEY"), "secret")
    Secret(value="").save(block_name("AWS_SECRET_ACCESS_KEY"))  # as a shell without it once left it
    with pytest.raises(StageError, match="AWS_SECRET_ACCESS_KEY"):
        deployed({**FULL, "AWS_SECRET_ACCESS_KEY": ""})


def test_rotated_secret_arrives_and_is_told_of_by_name_alone(client):
    deployed(FULL)
    said = deployed({**FULL, "AWS_SECRET_ACCESS_KEY": "second-key"})
    assert said == ["secret enginery-aws-secret-access-key: set -> changed", "1 changed, 18 as they were"]
    assert Secret.load(block_name("AWS_SECRET_ACCESS_KEY")).get() == "second-key"
    assert Secret.load(block_name("MLFLOW_TRACKING_PASSWORD")).get() == "first-password"
    assert env_of(client, "cpu")["AWS_SECRET_ACCESS_KEY"] == (
        "{{ prefect.blocks.secret.enginery-aws-secret-access-key }}"
    )


def test_limits_follow_the_options_that_name_them_and_nothing_else(client):
    deployed(FULL)
    client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=7))
    assert deployed({**FULL, "ENGINERY_CPU_STEPS": "2"}) == ["nothing to change: 19 as they were"]
    assert deployed(FULL, gpus=2, steps=6)[-1] == "3 changed, 16 as they were"
    assert [client.read_work_pool(name).concurrency_limit for name in POOLS] == [8, 6, 2]
    assert client.read_global_concurrency_limit_by_name("gpu").limit == 2
    requests = client.read_work_pool("gpu").base_job_template["variables"]["properties"]["device_requests"]
    assert requests["default"][0]["driver"] == "nvidia"
    assert deployed({}, dry=True)[-1] == "nothing to change: 19 as they were"  # nor does its GPU go


def test_deploy_of_the_other_type_is_refused_before_anything_is_changed(client):
    deployed(FULL)
    before = everything(client)
    with pytest.raises(StageError, match=r"work pool flows .*another type.*docker.*kubernetes"):
        deployed({**FULL, "AWS_SECRET_ACCESS_KEY": "second-key"}, kind="kubernetes")
    assert everything(client) == before


def test_command_in_a_shell_without_variables_keeps_what_stands(client, prefect_api, tmp_path):
    """What libraries are given as defaults, such as MLflow's address, is no variable of the shell."""
    deployed(FULL)
    before = everything(client)
    shell = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PREFECT_API_URL": prefect_api}
    done = subprocess.run(
        [sys.executable, "-m", "flows", "deploy"], cwd=ROOT, env=shell, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nothing to change: 19 as they were"
    assert everything(client) == before
    assert env_of(client, "flows")["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
