import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.adapters.connect import connect, default_store, pins
from stages.runtime.contract import StageError


def test_default_store_is_the_environments_or_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINERY_STORE", "s3://bucket/prefix")
    assert default_store() == "s3://bucket/prefix"
    monkeypatch.delenv("ENGINERY_STORE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store() == str(tmp_path / ".enginery" / "store")


@pytest.mark.parametrize("name", ["store", "a b#c?é%41", "100%", "deep/er"])
def test_folder_and_its_uri_open_the_same_store(tmp_path, name):
    first = connect(str(tmp_path / name))
    first.objects.put("artifacts/x", b"1")
    again = connect(first.uri)
    assert again.objects.read("artifacts/x") == b"1"
    assert again.scratch == first.scratch == tmp_path / name / "state"


def test_relative_and_home_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert connect("here").uri == (tmp_path / "here").as_uri()
    assert connect("~/there").uri == (tmp_path / "there").as_uri()


def test_scratch_lies_where_it_is_asked_for(tmp_path):
    assert connect(str(tmp_path / "store"), tmp_path / "scratch").scratch == tmp_path / "scratch"


@pytest.mark.parametrize("scheme", ["gopher", "s3.bucket", "a-b", "connect"])
def test_unknown_scheme_is_refused_with_what_is_allowed(scheme):
    with pytest.raises(StageError, match=f"no store speaks {scheme}://") as caught:
        connect(f"{scheme}://there/store")
    assert caught.value.limit.startswith("a folder, file://") and "s3://" in caught.value.limit


def test_store_that_cannot_be_made_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match="cannot be written to") as caught:
        connect(str(tmp_path / "file" / "store"))
    assert "--store" in caught.value.remedy


def test_store_on_a_read_only_disk_is_refused(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(StageError, match="Read-only file system"):
            connect(str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_pins_recall_what_was_remembered_and_nothing_else(tmp_path):
    kept = pins(connect(str(tmp_path)))
    assert kept.recall("hf://a/b@main") is None
    kept.remember("hf://a/b@main", "d1")
    kept.remember("hf://a/b@main", "d2")
    kept.remember("hf://a/c", "d3")
    again = pins(connect(str(tmp_path)))
    assert (again.recall("hf://a/b@main"), again.recall("hf://a/c"), again.recall("hf://a")) == ("d2", "d3", None)
    assert kept.downloads == tmp_path / "state" / "downloads"
    records = [json.loads(path.read_text()) for path in Path(tmp_path / "state" / "pins").iterdir()]
    assert {"source": "hf://a/b@main", "digest": "d2"} in records
    assert len(records) == 2
