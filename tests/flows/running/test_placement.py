"""Where stages run: the settings, and what the kernel says of memory."""

import pytest

from flows.prefect_api.retry import patiently
from flows.running.cgroup_memory import memory_limit_bytes, memory_peak_bytes, out_of_memory_kills
from flows.running.placement import Pools, load_pools
from flows.running.progress_relay import Receiver, Sender
from flows.settings import settle
from stages import STAGES, stage
from stages.runtime.contract import StageError, Unavailable


def test_pools_by_default_send_compile_and_validate_to_the_gpu_and_the_rest_to_the_cpu():
    pools = Pools()
    assert {name for name in STAGES if pools.place(name).pool == "gpu"} == {"compile", "validate"}
    assert {name for name in STAGES if pools.place(name).pool == "cpu"} == set(STAGES) - {"compile", "validate"}
    assert {name for name in STAGES if pools.place(name).network == "outside"} == {"fetch", "corpus"}
    for name in set(STAGES) - {"corpus"}:
        assert pools.image(name) == f"enginery/{stage(name).image}:0.1.0"


def test_pools_file_changes_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "pools.yaml"
    path.write_text("stages: {compile: {memory_bytes: 5}, recover: {minutes: 9}}\ndevices: {gpu: NVIDIA L4 x1}\n")
    monkeypatch.setenv("ENGINERY_POOLS", str(path))
    pools = load_pools()
    assert pools.place("compile") == Pools().place("compile").model_copy(update={"memory_bytes": 5})
    assert pools.place("recover").minutes == 9
    assert pools.place("share") == Pools().place("share")
    assert pools.devices_of_stages() == {"compile": "NVIDIA L4 x1", "validate": "NVIDIA L4 x1"}


@pytest.mark.parametrize(
    "said",
    ["stages: {compil: {}}", "stages: {compile: {pol: gpu}}", "nothing: 1", "stages: [1]", "a: [", "attempts: 0"],
)
def test_pools_file_that_is_wrong_is_refused_by_name(tmp_path, said):
    path = tmp_path / "pools.yaml"
    path.write_text(said)
    with pytest.raises(StageError, match=r"pools\.yaml"):
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


class Flaky:
    """Objects that are away for the first puts, one of which took place although its answer was lost."""

    def __init__(self):
        self.held, self.puts = {}, 0

    def put(self, key, data, *, replace=False):
        self.puts += 1
        if self.puts <= 3:
            if self.puts == 2:
                self.held[key] = data
            raise Unavailable("away")
        self.held[key] = data
        return True

    def read(self, key):
        return self.held.get(key)

    def delete(self, key):
        self.held.pop(key)


def test_relay_carries_everything_once_and_in_order_over_a_store_that_was_away(monkeypatch):
    monkeypatch.setattr("flows.running.progress_relay.FLUSH_S", 0.01)
    monkeypatch.setattr("flows.prefect_api.retry._PAUSE_S", 0.01)
    objects, heard = Flaky(), []

    class Listener:
        def advanced(self, done, total):
            heard.append(("advanced", done))

        def metric(self, name, value, step):
            heard.append((name, value, step))

        def note(self, text):
            heard.append(text)

    receiver = Receiver(objects, "one")
    sender = Sender(objects, "one")
    for number in range(40):
        sender.metric("loss", number / 2, number)
        sender.note(f"note {number}")
        receiver.hear(Listener())
    sender.advanced(1, 3)
    sender.advanced(3, 3)
    sender.end({"event": "sealed", "identity": "abc"})
    receiver.hear(Listener())
    assert [one for one in heard if isinstance(one, str)] == [f"note {number}" for number in range(40)]
    assert [one for one in heard if one[0] == "loss"] == [("loss", number / 2, number) for number in range(40)]
    assert heard[-1] == ("advanced", 3)
    assert receiver.last == {"event": "sealed", "identity": "abc"}
    receiver.forget()
    assert not objects.held


def test_patience_asks_until_the_answer_comes_and_gives_up_in_time(monkeypatch):
    monkeypatch.setattr("flows.prefect_api.retry._PAUSE_S", 0.01)
    answers, said = iter([Unavailable("away"), Unavailable("away"), 5]), []

    def ask():
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    assert patiently(ask, say=said.append) == 5
    assert len(said) == 1

    def never():
        raise Unavailable("away for good")

    with pytest.raises(Unavailable, match="for good"):
        patiently(never, away_s=0.05)


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
