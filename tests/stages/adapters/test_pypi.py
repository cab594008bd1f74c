"""pypi:// sources: the user's own pip, one file or folder out of a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.adapters import pypi
from stages.adapters.connect import FilePins
from stages.adapters.sources import Wanted, content, download, pin_source
from stages.runtime.contract import StageError, Unavailable
from stages.runtime.fingerprint import digest_bytes, digest_file
from stages.runtime.progress import Silent
from tests.stages.adapters.wheels import make_wheel, only_wheels_of

TEXT = Wanted("text", ("*.txt",), "Give text.")
FILES = {"pkg/data/a.txt": b"alpha\n" * 50_000, "pkg/data/inner/b.txt": b"beta", "pkg/data/c.py": b"raise SystemExit"}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    make_wheel(folder, "sample_text", "1.2", FILES)
    only_wheels_of(folder, monkeypatch)
    return folder


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_file_in_a_wheel_is_brought_and_known_without_pip_afterwards(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "pypi://sample-text==1.2/pkg/data/a.txt"
    pins = FilePins(tmp_path / "scratch")
    first = pin_source(source, TEXT, digest_file, pins, Silent())
    assert first.digest == digest_bytes(FILES["pkg/data/a.txt"])
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert pin_source(source, TEXT, digest_file, pins, Silent()) == first
    assert download(source, TEXT, pins.downloads, Silent()).read_bytes() == FILES["pkg/data/a.txt"]


def test_folder_in_a_wheel_holds_what_counts_and_nothing_else(wheels: Path, tmp_path: Path) -> None:
    tree = download("pypi://sample-text==1.2/pkg/data", TEXT, tmp_path / "downloads", Silent())
    found = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    assert found == {"a.txt": FILES["pkg/data/a.txt"], "inner/b.txt": b"beta"}
    assert list((tmp_path / "downloads").rglob("*.whl")) == []


def test_download_that_failed_is_not_taken_for_one_that_stands(wheels: Path, tmp_path: Path) -> None:
    source = "pypi://sample-text==1.2/pkg/missing"
    for _ in range(2):
        with pytest.raises(StageError, match=r"nothing of use at 'pkg/missing'.*pkg/data/a\.txt"):
            download(source, TEXT, tmp_path / "downloads", Silent())


def test_version_that_no_index_has_is_refused_with_the_remedy(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"pip has no wheel of sample-text==9.*Check name and version") as caught:
        download("pypi://sample-text==9/pkg", TEXT, tmp_path / "downloads", Silent())
    assert not isinstance(caught.value, Unavailable) and "\n" not in str(caught.value)


def test_index_that_does_not_answer_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://user:word@127.0.0.1:9/simple"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(Unavailable, match="did not answer") as caught:
        download("pypi://sample-text==1.2/pkg", TEXT, tmp_path / "downloads", Silent())
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("source", ["pypi://name/path", "pypi://name>=1/path", "pypi://==1/path", "pypi://a==1 b/path"])
def test_version_that_could_move_is_refused(source: str) -> None:
    with pytest.raises(StageError, match="names no fixed version"):
        pypi.parse(source)


def test_path_that_leaves_its_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", "evil", "1", {"pkg/../../../out.txt": b"out"})
    only_wheels_of(tmp_path / "wheels", monkeypatch)
    with pytest.raises(StageError, match="leaves its folder"):
        download("pypi://evil==1/pkg", TEXT, tmp_path / "downloads", Silent())
    assert list(tmp_path.rglob("out.txt")) == []


def test_download_that_was_killed_leaves_nothing_in_the_next(wheels: Path, tmp_path: Path) -> None:
    source, downloads = "pypi://sample-text==1.2/pkg/data/inner", tmp_path / "downloads"
    whole = download(source, TEXT, downloads, Silent())
    part = whole.parent.with_name(f"{whole.parent.name}.part")
    whole.parent.rename(part)
    (part / "tree" / "half.txt").write_text("half")
    tree = download(source, TEXT, downloads, Silent())
    assert [path.name for path in tree.iterdir()] == ["b.txt"]


def test_content_of_a_download_is_its_tree_or_its_one_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "file").mkdir(parents=True)
    (tmp_path / "a" / "file" / "x.txt").write_text("x")
    (tmp_path / "b" / "tree").mkdir(parents=True)
    assert content(tmp_path / "a").name == "x.txt" and content(tmp_path / "b").name == "tree"
