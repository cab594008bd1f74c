"""The README's production section on this machine: every stage in a container of its own, and what may go wrong."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.production import stack

pytestmark = [pytest.mark.production, pytest.mark.timeout(1500)]

RECIPE = "s3://enginery/recipes/arriving.yaml"
ON_ARRIVAL = "s3://enginery/recipes/on-arrival.yaml"
NOT_REPRODUCIBLE = {"gpu": "TensorRT chooses its kernels by timing them"}
"""Steps whose bytes may differ between two builds of the same work."""


@pytest.fixture(scope="session", autouse=True)
def stack_up():
    """Before any other, so that nothing is made ready where no engine answers: the only reason to skip."""
    if why := stack.why_not():
        pytest.skip(why)
    with stack.up():
        yield


@pytest.fixture(scope="module")
def sources(stack_up, tiny, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "reference.txt").write_text(reference, encoding="utf-8")
    stack.upload(tiny, "models/tiny")
    stack.upload(folder, "texts")
    recipe = Path(__file__).with_name("recipe.yaml").read_text(encoding="utf-8")
    for uri, text in {RECIPE: recipe, ON_ARRIVAL: shorter(recipe)}.items():
        stack.bucket().put_object(Bucket=stack.BUCKET, Key=uri.removeprefix("s3://enginery/"), Body=text.encode())


def shorter(recipe: str) -> str:
    """The recipe without the stages that say no more when they run a second time; each is a container's start."""
    said = yaml.safe_load(recipe)
    said["steps"] = [step for step in said["steps"] if step["name"] not in ("shared", "int8", "gpu")]
    steps = {step["name"]: step for step in said["steps"]}
    steps["pruned"]["inputs"]["model"] = "dense"
    steps["graph"]["inputs"]["model"] = "healed"
    said["judge"]["artifacts"] = ["cpu"]
    return yaml.safe_dump(said)


@pytest.fixture(scope="module")
def first(sources):
    """The flow run of the recipe, each stage in its container, while Prefect's API is away for three minutes."""
    flow_run = stack.start("optimize/scheduled", recipe=RECIPE)
    await_state()
    stack.run("docker", "stop", "--time", "1", stack.container("prefect"))
    time.sleep(180)
    stack.run("docker", "start", stack.container("prefect"))
    ended = stack.await_end(flow_run, 900)
    assert ended["type"] == "COMPLETED", f"{ended}\n{stack.logs(flow_run)}"
    return flow_run


@pytest.fixture(scope="module")
def embedded(first, tmp_path_factory):
    """The same recipe run on this machine alone, begun where what the stack does next is mostly waiting; its store."""
    home = tmp_path_factory.mktemp("embedded")
    shell = {**os.environ, **stack.environment(), "HOME": str(home)}
    alone = {name: value for name, value in shell.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = (sys.executable, "-m", "flows", "run", str(Path(__file__).with_name("recipe.yaml")))
    with (home / "said.txt").open("wb") as said:
        running = subprocess.Popen(
            (*command, "--store", str(home / "store")),
            cwd=stack.ROOT,
            stdout=said,
            stderr=said,
            env=alone,
        )

    def store() -> Path:
        assert running.wait(900) == 0, (home / "said.txt").read_text()[-6000:]
        return home / "store"

    yield store
    running.terminate()
    running.wait(60)


@pytest.fixture
def shell(monkeypatch, stack_up):
    from stages.adapters.s3 import client as s3_client

    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    s3_client.client.cache_clear()
    yield
    s3_client.client.cache_clear()


@pytest.fixture
def store(shell, tmp_path):
    from stages.adapters.connect import connect

    return connect(f"s3://{stack.BUCKET}/store", tmp_path / "scratch")


def by_step(store):
    return {manifest.provenance.step: (identity, manifest) for identity, manifest in store.manifests()}


def test_recipe_in_containers_seals_each_step_in_a_container_of_its_own(first, store):
    made = {name: manifest for name, (_, manifest) in by_step(store).items()}
    assert len(made) == 11  # nine steps, and the two judgements of dense and cpu
    hosts = [manifest.provenance.host for manifest in made.values()]
    assert len(set(hosts)) == len(hosts)
    assert {manifest.provenance.image for manifest in made.values()} == {"torch", "tensorrt", "server"}
    assert made["gpu"].provenance.image == "tensorrt"


def test_recipe_in_containers_leaves_its_metadata_in_postgresql_and_mlflow(first):
    assert stack.database(f"select state_type from flow_run where id = '{first}'") == "COMPLETED"
    assert int(stack.database("select count(*) from artifact where key like 'steps-%'")) >= 1
    assert versions() == ["1"]
    run = mlflow("runs/search", experiment_ids=["1"], filter="tags.`enginery.recipe` = 'arriving'")["runs"][0]
    described = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}["mlflow.note.content"]
    assert run["info"]["status"] == "FINISHED" and "✓ perplexity" in described, described
    assert "MLflow at" not in stack.logs(first), "it was waited for, or something was left out"


def test_steps_outlast_three_minutes_without_prefect_in_one_attempt(first):
    runs = stack.runs_of("run-stage")
    assert len({run["name"] for run in runs}) == len(runs) == 11
    asked = f"select count(*) from flow_run_state where flow_run_id in ('{first}', {{}}) and type = 'RUNNING'"
    assert stack.database(asked.format(", ".join(f"'{run['id']}'" for run in runs))) == "12"
    assert {run["run_count"] for run in runs} == {1}


def test_deploying_again_changes_nothing_with_the_variables_and_without(first, shell, tmp_path):
    stack.api("PATCH", "/work_pools/cpu", {"concurrency_limit": 3, "is_paused": True})
    bare = {name: "" for name in stack.environment() if not name.startswith("PREFECT_")} | {"HOME": str(tmp_path)}
    try:
        assert "nothing to change" in stack.run("docker", "start", "--attach", stack.container("set-up"))
        assert "nothing to change" in stack.run(sys.executable, "-m", "flows", "deploy", env=bare)
        pool = stack.api("GET", "/work_pools/cpu")
        assert pool["concurrency_limit"] == 3 and pool["is_paused"]
    finally:
        stack.api("PATCH", "/work_pools/cpu", {"is_paused": False})


def test_stages_of_the_gpu_pool_were_received_by_its_worker(first):
    pools = {run["name"]: run["work_pool_name"] for run in stack.runs_of("run-stage")}
    assert {name for name, pool in pools.items() if pool == "gpu"} == {
        "gpu",
        "cpu",
        "validate-dense-text",
        "validate-cpu-text",
    }
    assert {pool for pool in pools.values()} == {"cpu", "gpu"}


def test_stage_container_is_bare_limited_and_without_a_way_out(stack_up):
    said = stack.run(
        *("docker", "run", "--rm", "--network", f"{stack.name()}-stages", "--read-only", "--cap-drop", "ALL"),
        *("enginery/torch:0.1.0", "python3", "-c"),
        "import os, socket\n"
        "print(os.getuid())\n"
        "socket.create_connection(('s3', 8333), 5)\n"
        "try: socket.create_connection(('postgres', 5432), 5); print('reaches postgres')\n"
        "except OSError: pass\n"
        "try: socket.create_connection(('1.1.1.1', 443), 5); print('reaches out')\n"
        "except OSError: pass\n"
        "try: open('/opt/enginery/x', 'w'); print('writes')\n"
        "except OSError: pass\n",
    )
    assert said.split() == ["10001"]


def test_second_run_makes_nothing_again(first, embedded):
    before = len(stack.runs_of("run-stage"))
    said = stack.run(*stack.readme_commands()[1].split(), env={"RECIPE": RECIPE})
    assert "registered: arriving version 1 as champion" in said
    assert len(stack.runs_of("run-stage")) == before
    assert versions() == ["1"]


def test_arriving_checkpoint_starts_one_run_by_itself(first, embedded, tiny, tmp_path):
    stack.run(*stack.readme_commands()[2].split(), env={"ARRIVAL_RECIPE": ON_ARRIVAL})
    copy = tmp_path / "changed"
    shutil.copytree(tiny, copy)
    other_weights(copy)
    before = {run["id"] for run in stack.runs_of("optimize")}
    stack.upload(copy, "checkpoints/mine")

    def new():
        return [run for run in stack.runs_of("optimize") if run["id"] not in before]

    started = stack.until(new, 240, lambda: stack.run("docker", "logs", stack.container("watch")))
    try:
        await_state()
        faults()
    finally:
        ended = stack.await_end(started[0]["id"], 900)
    assert ended["type"] == "COMPLETED", f"{ended}\n{stack.logs(started[0]['id'])}"
    assert len(new()) == 1
    assert versions() == ["1", "2"]
    said = [stack.logs(run["id"]) for run in stack.runs_of("run-stage") if run["name"] == "healed"]
    assert any(re.search(r"goes on from step \d+", one) for one in said), said
    assert (
        "## Beside the champion, version 1"
        in mlflow("model-versions/get", name="arriving", version="2")["model_version"]["description"]
    )
    curve = mlflow("runs/search", experiment_ids=["1"], filter="tags.`enginery.step` = 'healed'")["runs"][0]
    history = mlflow("metrics/get-history", run_id=curve["info"]["run_id"], metric_key="kl")["metrics"]
    assert len({point["step"] for point in history}) > 10


def await_state() -> None:
    """Wait until `healed` has saved a state to go on from, seen in its own container."""

    def saved():
        for running in healing():
            looked = ("find", "/scratch", "-path", "*/drafts/*/.partial/state.safetensors")
            asked = subprocess.run(("docker", "exec", running, *looked), capture_output=True, text=True, check=False)
            if asked.stdout.strip():
                return True
        return False

    stack.until(saved, 600, lambda: stack.run("docker", "ps", "--all"))


def healing() -> list[str]:
    """The container in which `healed` is computed, if there is one now."""
    return stack.run(
        "docker", "ps", "--quiet", "--filter", "name=^healed", "--filter", f"volume={stack.name()}-scratch"
    ).split()


def faults() -> None:
    """Kill the worker and the container it watches, take S3 away for a minute, start PostgreSQL and MLflow again."""
    inside = healing()
    assert inside, "the stage ended before it could be killed"
    stack.run("docker", "kill", stack.container("cpu-worker"), inside[0])
    stack.run("docker", "stop", "--time", "1", stack.container("s3"))
    gone = time.monotonic()
    stack.run("docker", "restart", stack.container("postgres"))
    stack.run("docker", "restart", stack.container("mlflow"))
    time.sleep(max(0, gone + 60 - time.monotonic()))
    stack.run("docker", "start", stack.container("s3"), stack.container("cpu-worker"))


def other_weights(folder: Path) -> None:
    """Another checkpoint: the same tensors but one, a little larger."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "norm" in name)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def mlflow(path: str, **asked: object) -> dict:
    """Ask MLflow's server as its administrator."""
    method, extra = ("POST", {"json": asked}) if path == "runs/search" else ("GET", {"params": asked})
    answer = httpx.request(
        method,
        f"{stack.url('mlflow')}/api/2.0/mlflow/{path}",
        auth=("admin", stack.setting("MLFLOW_ADMIN_PASSWORD")),
        timeout=60,
        **extra,
    )
    return answer.raise_for_status().json()


def versions() -> list[str]:
    found = mlflow("model-versions/search", filter="name='arriving'", max_results=100)
    return sorted(one["version"] for one in found.get("model_versions", []))


def test_same_recipe_embedded_has_the_same_fingerprints_and_bytes(embedded, store):
    from stages.adapters.connect import connect

    containers = dict(store.manifests())
    alone = dict(connect(str(embedded())).manifests())
    assert len(alone) == 11
    assert {identity: one.provenance.step for identity, one in alone.items()} == {
        identity: containers[identity].provenance.step for identity in alone
    }
    differing = {one.provenance.step for identity, one in alone.items() if one.files != containers[identity].files}
    assert differing <= set(NOT_REPRODUCIBLE), differing


def test_gpu_job_that_would_start_carries_the_device_request(shell):
    """The job that the worker would hand to Docker, made and not started: this needs no GPU."""
    from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration

    import docker
    from flows.production.pools import declared
    from flows.production.variables import Shell

    template = Shell(os.environ).fill(declared("gpu", "docker", 1))
    template["variables"]["properties"]["env"]["default"] = {}
    asked = {"image": "enginery/tensorrt:0.1.0", "memory_bytes": 10**9, "command": "true"}
    job = asyncio.run(DockerWorkerJobConfiguration.from_template_and_values(template, asked))
    worker = DockerWorker(work_pool_name="gpu", test_mode=True)
    client = docker.from_env()
    made = worker._create_container(client, **worker._build_container_settings(client, job))
    try:
        host = client.api.inspect_container(made.id)["HostConfig"]
    finally:
        made.remove(force=True)
        client.close()
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert host["DeviceRequests"][0]["Driver"] == "nvidia"
    assert host["ReadonlyRootfs"]
    assert host["Memory"] == 10**9
    assert host["NetworkMode"] == f"{stack.name()}-stages"
    assert host["Binds"] == [f"{stack.name()}-scratch:/scratch"]


def test_stage_that_needs_more_memory_than_it_may_says_so(stack_up, shell, tmp_path):
    pools = tmp_path / "pools.yaml"
    pools.write_text("stages: {recover: {memory_bytes: 420000000}}\nattempts: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", RECIPE, "--launcher", "pool", "--force", "healed"],
        cwd=stack.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "ENGINERY_POOLS": str(pools), "HOME": str(tmp_path)},
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"memory ran out; measured peak 0\.4\d GB; limit 0\.42 GB", done.stderr), done.stderr
