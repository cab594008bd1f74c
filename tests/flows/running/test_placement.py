"""Where stages run: the settings, and what the kernel says of memory."""

import pytest

from flows.running.placement import Pools, load_pools
from flows.settings import settle
from stages import STAGES, stage
from stages.corpus.params import CorpusParams
from stages.runtime.cgroup_memory import memory_limit_bytes, memory_peak_bytes, out_of_memory_kills
from stages.runtime.contract import StageError
from stages.runtime.cuda_driver import gpu_architecture


def test_pools_by_default_send_compile_and_what_measures_to_the_gpu_and_the_rest_to_the_cpu():
    pools = Pools()
    assert {name for name in STAGES if pools.place(name).pool == "gpu"} == {"compile", "validate", "bench"}
    assert {name for name in STAGES if pools.place(name).pool == "cpu"} == set(STAGES) - {
        "compile",
        "validate",
        "bench",
    }
    assert {name for name in STAGES if pools.place(name).network == "outside"} == {"fetch", "corpus", "items"}
    for name in set(STAGES) - {"corpus"}:
        assert pools.image(name) == f"enginery/{stage(name).image}:0.1.0"


def test_pools_file_changes_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "pools.yaml"
    path.write_text(
        "stages: {compile: {memory_bytes: 5}, recover: {minutes: 9}}\ndevices: {gpu: a processor x8}\n"
        "gpus: {gpu: {name: NVIDIA L4, architecture: sm_89}}\n"
    )
    monkeypatch.setenv("ENGINERY_POOLS", str(path))
    pools = load_pools()
    assert pools.place("compile") == Pools().place("compile").model_copy(update={"memory_bytes": 5})
    assert pools.place("recover").minutes == 9
    assert pools.place("share") == Pools().place("share")
    assert [pools.device(name, "onnxruntime:cpu") for name in ("validate", "bench", "share")] == [
        *["a processor x8"] * 2,
        "",
    ]
    assert [pools.device("validate", one) for one in ("torch:cuda", "tensorrt_rtx:sm_89")] == ["NVIDIA L4"] * 2
    assert pools.gpu() == "sm_89" and Pools().gpu() == gpu_architecture()


def test_corpus_that_a_model_writes_runs_where_torch_is_unless_its_place_names_an_image(tmp_path):
    params = {
        source: CorpusParams.model_validate({"source": source, "splits": {"test": 1.0}})
        for source in ("pydoc://topics", "model://self")
    }
    path = tmp_path / "pools.yaml"
    path.write_text("stages: {corpus: {image: ''}}\n")
    images = [load_pools(str(path)).job_variables("corpus", one)["image"] for one in params.values()]
    assert images == ["enginery/base:0.1.0", "enginery/torch:0.1.0"]
    assert {Pools().image("corpus", one) for one in params.values()} == {"enginery/server:0.1.0"}


@pytest.mark.parametrize(
    "said",
    ["stages: {compil: {}}", "stages: {compile: {pol: gpu}}", "nothing: 1", "stages: [1]", "a: [", "attempts: 0"],
)
def test_pools_file_that_is_wrong_is_refused_by_name(tmp_path, said):
    path = tmp_path / "pools.yaml"
    path.write_text(said)
    with pytest.raises(StageError, match=r"pools\.yaml"):
        load_pools(str(path))


def test_pools_file_gives_a_stage_job_variables_of_its_own_beside_those_that_fields_set(tmp_path):
    path = tmp_path / "pools.yaml"
    path.write_text("stages: {recover: {minutes: 9, job_variables: {volumes: ['data:/data'], env: {A: b}}}}\n")
    pools = load_pools(str(path))
    assert pools.job_variables("recover") == {
        "volumes": ["data:/data"],
        "env": {"A": "b"},
        "image": "enginery/torch:0.1.0",
        "network": "enginery-stages",
        "memory_bytes": 8 * 10**9,
        "seconds": 9 * 60 + 120,
    }
    assert pools.job_variables("share").keys() == {"image", "network", "memory_bytes", "seconds"}


@pytest.mark.parametrize(
    ("name", "field"),
    [("image", "`image`"), ("network", "`network`"), ("memory_bytes", "`memory_bytes`"), ("seconds", "`minutes`")],
)
def test_pools_file_that_sets_a_field_by_a_job_variable_is_told_the_field(tmp_path, name, field):
    path = tmp_path / "pools.yaml"
    path.write_text(f"stages: {{recover: {{job_variables: {{{name}: 1}}}}}}\n")
    with pytest.raises(StageError, match=rf"(?s)pools\.yaml.*{name} .*set {field}"):
        load_pools(str(path))


def test_pools_file_that_is_missing_is_refused():
    with pytest.raises(StageError, match="cannot be read"):
        load_pools("nowhere.yaml")


def test_memory_of_a_container_is_read_from_either_version_of_control_groups(tmp_path):
    new, old, none = tmp_path / "new", tmp_path / "old", tmp_path / "none"
    new.mkdir()
    (old / "memory").mkdir(parents=True)
    for path, value in (
        ("memory.max", "5000000\n"),
        ("memory.peak", "4000000\n"),
        ("memory.events", "low 0\noom_kill 2\n"),
    ):
        (new / path).write_text(value)
    (old / "memory" / "memory.limit_in_bytes").write_text("6000000\n")
    (old / "memory" / "memory.max_usage_in_bytes").write_text("6000000\n")
    (old / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 1\noom_kill 7\n")
    assert (memory_limit_bytes(new), memory_peak_bytes(new), out_of_memory_kills(new, vmstat)) == (5000000, 4000000, 2)
    assert (memory_limit_bytes(old), memory_peak_bytes(old), out_of_memory_kills(old, vmstat)) == (6000000, 6000000, 1)
    assert memory_limit_bytes(none) > 10**8
    assert memory_peak_bytes(none) == 0
    assert out_of_memory_kills(none, vmstat) == 7
    assert out_of_memory_kills(none, none) == 0
    (new / "memory.max").write_text("max\n")
    assert memory_limit_bytes(new) == memory_limit_bytes(none)


def test_settings_launcher_comes_from_the_environment_and_pool_needs_a_server(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert settle(store="x").launcher == "process"
    monkeypatch.setenv("ENGINERY_LAUNCHER", "pool")
    with pytest.raises(StageError, match="needs a Prefect server"):
        settle(store="x")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.setenv("ENGINERY_THREADS", "3")
    assert (settle(store="x").launcher, settle(store="x").threads) == ("pool", 3)
    assert settle(store="x").jobs > 1
    monkeypatch.setenv("ENGINERY_THREADS", "many")
    with pytest.raises(StageError, match="ENGINERY_THREADS"):
        settle(store="x")
    with pytest.raises(StageError, match="no launcher 'pol'"):
        settle(store="x", launcher="pol")
