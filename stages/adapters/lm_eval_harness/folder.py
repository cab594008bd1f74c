"""A task of lm-evaluation-harness that lies in a folder: its YAML, and the data that this names.

It is copied as it is; `validate` has the harness put it to the model. Code that comes with it is never run, and nothing
is downloaded: a task that asks for either is refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.adapters.sources import Wanted
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical, digest_bytes, digest_file

LOCAL = ("json", "csv", "parquet", "text")
"""Kinds of `dataset_path` that read files."""
_FUNCTION = re.compile(r"!function\b")
WANTED = Wanted(
    "harness",
    ("*.yaml", "*.yml", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.txt"),
    "Give a folder with the YAML of the task and its data.",
)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise StageError(f"{folder} is no folder with a task of lm-evaluation-harness", remedy=WANTED.remedy)
    return [one for one in sorted(folder.rglob("*")) if one.is_file() and WANTED.takes(one.name)]


def digest_of_task(folder: Path) -> str:
    """The identity of a task: the names and bytes of its files.

    Raises:
        StageError: there is no folder.
    """
    named = [[one.relative_to(folder).as_posix(), digest_file(one)] for one in _files(folder)]
    return digest_bytes(canonical(named))


def copied_task(folder: Path, name: str, to: Path) -> dict[str, Any]:
    """Copy a task, and return what it says, over what it includes; its data files by their names below `to`.

    Raises:
        StageError: there is no such task, it brings code, or its data lie elsewhere.
    """
    files = _files(folder)
    for one in files:
        target = to / one.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one, target)
    path = to / f"{name}.yaml"
    if not path.is_file():
        have = ", ".join(one.stem for one in files if one.suffix == ".yaml")
        raise StageError(
            f"{folder} has no task {name!r}",
            measured=have or "no .yaml file",
            remedy=f"Name one of these in `harness`, or put {name}.yaml there.",
        )
    said = _merged(path, to)
    return said | {
        "task": name,
        "dataset_kwargs": said.get("dataset_kwargs", {}) | {"data_files": _data(said, to, name)},
    }


def _merged(path: Path, root: Path) -> dict[str, Any]:
    """What a YAML file says, over what it includes."""
    text = path.read_text(encoding="utf-8")
    if found := _FUNCTION.search(text):
        raise StageError(
            f"{path.name} line {text.count(chr(10), 0, found.start()) + 1} calls a function, "
            "and code that comes with a task is not run",
            remedy="Say it in Jinja, or measure answers by a package of your own: `own` of `judge`.",
        )
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StageError(f"{path.name} is not YAML", measured=error, remedy="Correct it.") from error
    if not isinstance(said, dict):
        raise StageError(f"{path.name} holds no task", measured=type(said).__name__, remedy=WANTED.remedy)
    above = said.pop("include", [])
    whole: dict[str, Any] = {}
    for one in [above] if isinstance(above, str) else above:
        file = (path.parent / one).resolve()
        if root.resolve() not in file.parents or not file.is_file():
            raise _elsewhere(path.name, f"it includes {one}")
        whole |= _merged(file, root)
    return whole | said


def _data(said: Mapping[str, Any], root: Path, task: str) -> dict[str, str]:
    """Split -> the file of data that a task names, below its folder."""
    kwargs = said.get("dataset_kwargs")
    named = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if said.get("dataset_path") not in LOCAL or not isinstance(named, dict):
        raise _elsewhere(task, f"dataset_path {said.get('dataset_path')!r}")
    found = {}
    for split, name in named.items():
        file = (root / str(name)).resolve()
        if root.resolve() not in file.parents or not file.is_file():
            raise _elsewhere(task, repr(name))
        found[str(split)] = file.relative_to(root.resolve()).as_posix()
    return found


def _elsewhere(name: str, measured: str) -> StageError:
    return StageError(
        f"{name} does not name data that lie beside it",
        measured=measured,
        limit=f"dataset_path one of {', '.join(LOCAL)}, and a file of the folder for each split",
        remedy="As in dataset_path: json, dataset_kwargs: {data_files: {test: items.jsonl}}.",
    )
