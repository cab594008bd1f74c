"""Commands that only look need no right to write, write nothing, and make no store where there is none."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.cli import main
from flows.commands.options import looked_at
from flows.registry import journal
from flows.registry.journal import Candidate, Executable, Version
from flows.running.run_records import open_run
from stages.adapters.connect import connect
from stages.adapters.s3.client import client
from stages.runtime.contract import Kind, StageError
from tests.flows.recorded import tracking_in
from tests.flows.test_cli import own_store, result, sealed, valid
from tests.flows.triggers.test_watch import recipe
from tests.stages.adapters.conftest import s3_endpoint, s3_root

WALK = [
    ["ls"], ["ls", "--json"], ["runs"], ["explain", "last"], ["logs", "last"], ["inspect", "one"], ["verify", "one"],
    ["verify", "other"], ["compare", "one", "other"], ["compare", "last", "last", "--all"], ["models"],
    ["models", "m", "--json"], ["sweep", "--dry-run"],
]  # fmt: skip
WITHOUT_RECORDS = [words for words in WALK if "last" not in words]


def filled(uri: str) -> None:
    """A store with two artifacts, a run, and a model in the journal and in MLflow."""
    from flows.registry.projection import Registry, release

    store = connect(uri)
    identity = sealed(store, "one", {"deep/x.bin": b"12345", "model.onnx": b""}, Kind.ENGINE, {"size_bytes": 5.0})
    sealed(store, "other", {"x.bin": b"123456"}, metrics={"size_bytes": 6.0})
    record = open_run(store.scratch, recipe("a"), ["enginery", "run"])
    record.log({"event": "note", "text": "words"})
    record.finish(result(run=record.name))
    gate = {"measure": "perplexity", "artifact": "cpu", "against": "dense", "corpus": "text", "measured": 1.1}
    candidate = Candidate(
        model="m",
        serves="cpu",
        executables={"cpu": Executable(fingerprint=identity, target="onnxruntime:cpu", judged=True)},
        verdict={"passed": True, "gates": [gate]},
        run="0" * 32,
    )
    registry = Registry(store.objects, tracking_in(store.scratch))
    registry.client.create_registered_model("m")
    tags = {"enginery.identity": candidate.identity, "enginery.candidate": candidate.model_dump_json()}
    registry.client.create_model_version("m", "s3://nowhere", tags=tags)
    version = Version(number="1", logged_model="", candidate=candidate)
    journal.append(store.objects, "m", "champion", "promote", lambda _: version, "good")
    registry.client.set_registered_model_alias("m", "champion", "1")


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_commands_that_look_change_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    filled(str(tmp_path / "store"))
    before = state(tmp_path)
    for words in WALK:
        assert main([*words, "--store", str(tmp_path / "store")]) == 0, (words, capsys.readouterr().err)
        assert state(tmp_path) == before, words
    assert "perplexity against dense on text" in capsys.readouterr().out


@pytest.mark.parametrize("words", WALK, ids=" ".join)
def test_commands_that_look_say_that_there_is_no_store_and_make_none(tmp_path, capsys, words):
    assert main([*words, "--store", str(tmp_path / "none" / "store")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: there is no store at ") and said.err.count("\n") == 1 and not said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_prefix_and_bucket_without_a_store_are_said_and_nothing_is_put(s3_root, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINERY_HOME", str(tmp_path / "home"))
    assert main(["ls", "--store", s3_root]) == 1
    assert f"there is no store at {s3_root}" in capsys.readouterr().err
    assert main(["ls", "--store", "s3://no-such-bucket/x"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.fault
def test_store_in_s3_that_one_may_only_read_is_read_and_nothing_is_put(s3_root, capsys, monkeypatch, tmp_path):
    for name, value in {"ENGINERY_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": ""}.items():
        monkeypatch.setenv(name, value)
    filled(s3_root)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader")
    client.cache_clear()
    asked = []
    client().meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    with pytest.raises(StageError, match="denied"):
        connect(s3_root)
    asked.clear()
    for words in WITHOUT_RECORDS:
        assert main([*words, "--store", s3_root]) == 0, (words, capsys.readouterr().err)
    assert asked and not [name for name in asked if name.startswith(("Put", "Delete", "Create", "Copy", "Abort"))]


@pytest.fixture
def read_only(tmp_path):
    """A filled store whose disk takes no write, from root either."""
    filled(str(tmp_path / "store"))
    place = tmp_path / "mounted"
    place.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount") or not mounted("--bind", str(tmp_path / "store"), str(place)):
        pytest.skip("needs the right to mount a file system")
    try:
        if not mounted("-o", "remount,ro,bind", str(place)):
            pytest.skip("needs the right to mount a file system read-only")
        yield place
    finally:
        # Lazily: MLflow keeps its database open.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_what_torch_keeps_for_commands_that_look_lies_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    filled(str(tmp_path / "store"))
    found = looked_at(str(tmp_path / "store"))
    kept = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert not kept.is_relative_to(found.objects.root) and not kept.is_relative_to(found.scratch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/a/persons")
    looked_at(str(tmp_path / "store"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/a/persons"


def mounted(*words):
    return subprocess.run(["mount", *words], check=False).returncode == 0


def test_store_on_a_disk_that_takes_no_write_is_read(read_only, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "x").touch()
    assert main(["sweep", "--store", str(read_only)]) == 1
    assert "cannot be written to (Read-only file system)" in capsys.readouterr().err
    for words in WALK:
        assert main([*words, "--store", str(read_only)]) == 0, (words, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "every byte matches" in said and "perplexity against dense on text" in said and "not asked" not in said
