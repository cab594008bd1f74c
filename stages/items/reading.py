"""Rows of a person's own files as items: .jsonl, .csv, .parquet, with the columns that they have.

In a .csv an empty cell is nothing, and `|` stands between several answers, choices, words or labels; elsewhere null is
nothing. That is right where a default serves, and refused where an item needs something.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from stages.adapters import row_files
from stages.measures.items import Item
from stages.runtime.contract import StageError
from stages.runtime.encodings import PACKED
from stages.runtime.fingerprint import canonical, digest_bytes, digest_file
from stages.runtime.rows import reached

Column = Literal[
    "id",
    "ability",
    "language",
    "task",
    "prompt",
    "answers",
    "match",
    "choices",
    "right",
    "checks",
    "context",
    "words",
    "labels",
    "other",
    "score",
]
LISTS = ("answers", "choices", "words", "labels")
READERS = {".jsonl": row_files.json_rows, ".csv": row_files.csv_rows, ".parquet": row_files.parquet_rows}
PATTERNS = tuple(f"*{suffix}{packed}" for suffix in READERS for packed in ("", PACKED))
REMEDY = "Give a .jsonl, .csv or .parquet file, any of them with .gz, or a folder of them."
BETWEEN = "|"
"""Stands between the values of a list in a cell of .csv."""
_LETTERS = "ABCDEFGHIJ"
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")
"""Scripts that put no space between words: Thai, Chinese and Japanese, with their punctuation."""
_OPENS, _CLOSES = tuple("([{<\u201c\u2018\"'`_/$#@"), tuple(".,;:!?)]}%\u201d\u2019")
"""What the next word clings to, and what clings to the word before."""


def item_files(path: Path) -> list[tuple[str, Path]]:
    """(name inside the source, file) of each file of items at a path, in order of names.

    Raises:
        StageError: there is none.
    """
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    found = [("" if one == path else one.relative_to(path).as_posix(), one) for one in files if _format(one)]
    if not found:
        raise StageError(f"{path} holds no items", limit=f"{', '.join(READERS)}, and with {PACKED}", remedy=REMEDY)
    return found


def digest_of_files(path: Path) -> str:
    """The identity of files of items: names below the folder, formats and bytes. A single file's name is no part."""
    return digest_bytes(canonical([[name, _format(file), digest_file(file)] for name, file in item_files(path)]))


def _format(file: Path) -> str:
    """`.csv` for ITEMS.CSV.gz, empty for what is no file of items."""
    suffix = Path(file.name.lower().removesuffix(PACKED)).suffix
    return suffix if suffix in READERS else ""


def items_of(path: Path, columns: Mapping[Column, str], defaults: Mapping[str, str], *, spaced: bool) -> list[Item]:
    """The items of a file or a folder, in order.

    Args:
        path: what was found at the source.
        columns: field -> the column that it stands in, where that is not of the field's name.
        defaults: `task`, `ability`, `language` and `match` of rows that name none.
        spaced: a space stands between a prompt and choices that bring none.

    Raises:
        StageError: a row that is no item, or an id that stands twice; it names file and line or row.
    """
    met: dict[str, str] = {}
    items, seen = [], set[str]()
    for name, file in item_files(path):
        kind = _format(file)
        for number, where, row in READERS[kind](file):
            seen.update(field for field in columns if reached(row, columns[field])[0])
            given = {**defaults, **_given(row, columns, where, table=kind == ".csv")}
            _check_needed(row, columns, given, where, table=kind == ".csv")
            given.setdefault("id", f"{name}:{number}" if name else str(number))
            item = _apart(_item(given, where)) if spaced else _item(given, where)
            if item.id in met:
                raise _wrong(
                    f"{where} has the id {item.id!r}, which {met[item.id]} has, too", "Give each item its own."
                )
            met[item.id] = where
            items.append(item)
    if not items:
        raise StageError(f"{path} holds no items", measured="0 rows", limit=1, remedy="Give a file with rows.")
    if unmet := [field for field in columns if columns[field] and field not in seen]:
        raise StageError(
            f"no row has the column {columns[unmet[0]]!r} that `columns` names for {unmet[0]}",
            remedy="Name a column that is there.",
        )
    return items


def _given(row: Mapping[str, Any], columns: Mapping[Column, str], where: str, *, table: bool) -> dict[str, Any]:
    """What a row says of the fields of an item."""
    found: dict[str, Any] = {}
    for field in get_args(Column):
        column = columns.get(field, field)
        present, value = reached(row, column) if column else (False, None)
        if present and not _is_nothing(value, table):
            found[field] = value
    for field in LISTS:
        if field in found:
            found[field] = list(_texts(found[field], where, field, table=table))
    if isinstance(found.get("checks"), str):
        found["checks"] = _of_json(found["checks"], where)
    if isinstance(found.get("id"), int):
        found["id"] = str(found["id"])
    return found


def _check_needed(
    row: Mapping[str, Any], columns: Mapping[Column, str], given: dict[str, Any], where: str, *, table: bool
) -> None:
    """Raise StageError where a row has no prompt, or a question that nobody says is answered or not."""
    if given["task"] == "tag" and given.get("words") and not given.get("prompt"):
        given["prompt"] = ("" if given.get("language") == "zh" else " ").join(given["words"])
    if not str(given.get("prompt", "")).strip():
        column = columns.get("prompt", "prompt")
        raise _wrong(
            f"{where} has nothing in {column!r}"
            if reached(row, column)[0]
            else f"{where} has no column {column!r} for the prompt",
            "Say in the step's parameter `columns` where the prompt stands, or give the row one.",
            measured=f"it has {', '.join(row) or 'none'}",
        )
    if given["task"] == "question" and "answers" not in given:
        # A cell can say that there are none only by being empty.
        if not (table and reached(row, columns.get("answers", "answers"))[0]):
            raise _wrong(
                f"{where} does not say in {columns.get('answers', 'answers')!r} what is accepted",
                "Give it, or an empty list where the context does not answer the question.",
                measured=f"it has {', '.join(row) or 'none'}",
            )
        given["answers"] = []


def _is_nothing(value: Any, table: bool) -> bool:
    # NaN is how pandas writes what is missing.
    return value is None or (isinstance(value, float) and math.isnan(value)) or (table and not value.strip())


def _texts(value: Any, where: str, field: str, *, table: bool) -> Iterator[str]:
    """One value or several, as texts; a number is what it is written as."""
    parts = value.split(BETWEEN) if table else value if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | float):
            kind = "null" if part is None else type(part).__name__
            raise _wrong(f"{where} has {kind} among its {field}", "Give a text or a list of texts.")
        text = f"{part:.15g}" if isinstance(part, float) else str(part)
        if not text.strip():
            raise _wrong(f"{where} has an empty text among its {field}", "Leave it out, or write what it should be.")
        yield text


def _of_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(
            f"{where} has checks that are not JSON ({error})", 'As in [{"demand": "lines", "value": 3}].'
        ) from error


def _item(given: dict[str, Any], where: str) -> Item:
    if given["task"] == "choices":
        given["right"] = _right(given, where)
    try:
        return Item.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        said = str(first["msg"]).removeprefix("Value error, ")
        measured = repr(first["input"])[:80] if at else None
        raise _wrong(
            f"{where}: {at}: {said}" if at else f"{where}: {said}", "Correct the row.", measured=measured
        ) from error


def _apart(item: Item) -> Item:
    """An item whose choices stand apart from its prompt as words do, unless one of them says itself what is between."""
    borders = [item.prompt[-1], *(one[:1] for one in item.choices)]
    cling = item.prompt.endswith(_OPENS) or any(one.startswith(_CLOSES) for one in item.choices)
    if item.task != "choices" or cling or any(one.isspace() or _UNSPACED.match(one) for one in borders):
        return item
    return item.model_copy(update={"choices": tuple(f" {one}" for one in item.choices)})


def _right(given: Mapping[str, Any], where: str) -> int:
    """The number of the right choice, which may be given as that, from 0, by its letter or by its text."""
    choices, said = given.get("choices", []), given.get("right")
    if said is None:
        raise _wrong(f"{where} does not say which choice is right", "Give its number from 0, its letter or its text.")
    found: set[int] = set()
    if isinstance(said, int) and not isinstance(said, bool):
        found = {said}
    elif isinstance(said, float) and said.is_integer():
        found = {int(said)}
    elif isinstance(said, str):
        own = said.strip()
        found = {number for number, one in enumerate(choices) if one.strip() == own}
        if own.isdecimal():
            found.add(int(own))
        elif own.upper() in _LETTERS and len(own) == 1 and not found:
            found = {_LETTERS.index(own.upper())}
    if len(found) != 1 or not 0 <= min(found) < len(choices):
        raise _wrong(
            f"{where} does not say which choice is right",
            "Give the number of the right one from 0, its letter or its text, such that only one can be meant.",
            measured=repr(said),
            limit=f"{len(choices)} choices",
        )
    return min(found)


def _wrong(what: str, remedy: str, *, measured: object = None, limit: object = None) -> StageError:
    return StageError(what, measured=measured, limit=limit, remedy=remedy)
