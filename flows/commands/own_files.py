"""What `init` looks at in a person's own text and items, where they lie here: files that are read, columns as asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args
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
    "labels": ("tags", "ner_tags"),
}
"""Field of an item -> what others call it."""
_CALLED_IN: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("translate", "prompt"): ("source", "src"),
    ("translate", "answers"): ("translation", "reference", "references", "tgt"),
    ("classify", "prompt"): ("sentence1", "text1", "premise", "question1"),
    ("classify", "context"): ("sentence2", "text2", "hypothesis", "question2", "text_pair", "pair"),
    ("classify", "answers"): ("label", "labels", "class", "category", "sentiment"),
    ("question", "answers"): ("answers.text",),
    ("tag", "words"): ("tokens",),
    ("similarity", "prompt"): ("sentence1", "text1"),
    ("similarity", "other"): ("sentence2", "text2"),
    ("similarity", "score"): ("similarity", "label"),
}
"""The same in items of one task alone."""
_PERHAPS: Mapping[str, str] = {"tag": "words", "classify": "context"}
"""Task of items -> a field that a row may have; the other text of a pair is one."""


def check_text(source: str) -> None:
    """Raise StageError where no corpus reads what lies here: what lies elsewhere, `plan` looks at."""
    from stages.adapters.texts import text_files

    if source.startswith("file://"):
        text_files(_path(source))


def columns_of(source: str, task: str) -> tuple[dict[str, str], list[str], list[str]]:
    """What the first row of items that lie here says of its columns.

    Returns:
        Fields that stand in columns of other names, the fields that stand in none, and the row's columns; `a.b` is
        a column within one.

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
    lacking = [field for field in _NEEDED.get(task, ()) if not _holds(row, field)]
    found = {field: column for field in lacking if (column := _called(row, task, field))}
    perhaps = _PERHAPS.get(task)
    if perhaps and not _holds(row, perhaps) and (column := _called(row, task, perhaps)):
        found[perhaps] = column
    if task == "tag" and (_holds(row, "words") or "words" in found):
        found.pop("prompt", None)
        lacking = [field for field in lacking if field != "prompt"]
    return found, [field for field in lacking if field not in found], list(_columns(row))


def task_of(source: str) -> str:
    """The task that the first row of items that lie here names; empty where it names none that there is."""
    from stages.items.reading import item_files
    from stages.measures.items import Kind

    row = _first_row(item_files(_path(source))[0][1]) if source.startswith("file://") else None
    named = str((row or {}).get("task") or "").strip()
    return named if named in get_args(Kind) else ""


def _called(row: Mapping[str, Any], task: str, field: str) -> str:
    """What others call a field, where a row has one such column alone; else nothing."""
    there = [one for one in (*_CALLED.get(field, ()), *_CALLED_IN.get((task, field), ())) if _holds(row, one)]
    return there[0] if len(there) == 1 else ""


def _holds(row: Mapping[str, Any], column: str) -> bool:
    from stages.runtime.rows import reached

    there, value = reached(row, column)
    return there and not isinstance(value, dict)


def _columns(row: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from _columns(value, f"{within}{name}.")
        else:
            yield f"{within}{name}"


def _first_row(file: Path) -> Mapping[str, Any] | None:
    from stages.items.reading import READERS
    from stages.runtime.encodings import PACKED

    suffix = Path(file.name.lower().removesuffix(PACKED)).suffix
    for _, _, row in READERS[suffix](file):
        return row
    return None


def _path(source: str) -> Path:
    return Path(unquote(urlsplit(source).path))
