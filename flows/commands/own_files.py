"""What `init` looks at in a person's own text and items, where they lie here: files that are read, columns as asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "answers": ("prompt", "answers"),
    "translate": ("prompt", "answers"),
    "classify": ("prompt", "answers"),
    "question": ("prompt", "answers"),
    "tag": ("prompt", "labels"),
    "choices": ("prompt", "choices"),
    "similarity": ("prompt", "other", "score"),
}
"""Task of items -> the fields that a row of it has."""
_CALLED: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "instruction", "input", "text", "sentence"),
    "answers": ("answer", "output", "response", "target"),
    "choices": ("options",),
    "labels": ("tags",),
}
"""Field of an item -> what others call it."""


def check_text(source: str) -> None:
    """Raise StageError where no corpus reads what lies here: what lies elsewhere, `plan` looks at."""
    from stages.adapters.texts import text_files

    if source.startswith("file://"):
        text_files(_path(source))


def columns_of(source: str, task: str) -> tuple[dict[str, str], list[str], list[str]]:
    """What the first row of items that lie here says of its columns.

    Returns:
        Fields that stand in columns of other names, the fields that stand in none, and the row's columns.

    Raises:
        StageError: no set of items reads it.
    """
    from stages.items.reading import item_files

    if not source.startswith("file://"):
        return {}, [], []
    files = item_files(_path(source))
    row = _first_row(files[0][1])
    if row is None or "task" in row:  # a row that names its task has columns of that one
        return {}, [], []
    lacking = [field for field in _NEEDED.get(task, ()) if field not in row]
    if task == "tag" and "words" in row:
        lacking = [field for field in lacking if field != "prompt"]
    found: dict[str, str] = {}
    for field in lacking:
        there = [one for one in _CALLED.get(field, ()) if one in row]
        found |= {field: there[0]} if len(there) == 1 else {}
    return found, [field for field in lacking if field not in found], list(row)


def _first_row(file: Path) -> Mapping[str, Any] | None:
    from stages.items.reading import READERS
    from stages.runtime.encodings import PACKED

    suffix = Path(file.name.lower().removesuffix(PACKED)).suffix
    for _, _, row in READERS[suffix](file):
        return row
    return None


def _path(source: str) -> Path:
    return Path(unquote(urlsplit(source).path))
