"""Files of rows: JSON lines, JSON, CSV, parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from stages.runtime.contract import StageError
from stages.runtime.encodings import PACKED, lines, opened, whole_text
from stages.runtime.rows import CHATS, TEXT, Content, content_of, no_text, pair_of, reads

_LONGEST_CELL = 2**31 - 1
"""Characters of a cell: Python's own limit of 131,072 is less than a long context has."""
Row = tuple[int, str, dict[str, Any]]
"""Its number, where it stands, and its columns."""
_BETWEEN_CELLS = ",;\t"
"""Semicolons are what Excel writes where the comma stands in numbers."""


def json_rows(file: Path) -> Iterator[Row]:
    """The object on each line of a .jsonl file; blank lines are none.

    Raises:
        StageError: a line that is no object; the error names file and line.
    """
    for number, where, row in _parsed(file, lines(file)):
        if not isinstance(row, dict):
            raise _not_json(where, ValueError(f"a {type(row).__name__} and no object"))
        yield number, where, row


def csv_rows(file: Path) -> Iterator[Row]:
    """The rows of a .csv file by the names in its first one; blank lines are none.

    Between its cells stand commas, or semicolons or tabs where these are the most of the first line.

    Raises:
        StageError: quotes that do not end, a column named twice, a row of more or fewer cells; file and line are named.
    """
    csv.field_size_limit(_LONGEST_CELL)
    text = whole_text(file)
    first = next((line for line in StringIO(text) if line.strip()), "")
    reader = csv.reader(StringIO(text, newline=""), delimiter=max(_BETWEEN_CELLS, key=first.count), strict=True)
    names: list[str] = []
    number = line = 0
    try:
        for cells in reader:
            where, line = f"{file} line {line + 1}", reader.line_num
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise StageError(
                        f"{where} names a column more than once",
                        measured=", ".join(repr(name) for name in twice),
                        limit="each once",
                        remedy="Rename one, or take it out.",
                    )
                continue
            number += 1
            if len(cells) != len(names):
                raise StageError(
                    f"{where} has not as many cells as there are columns",
                    measured=len(cells),
                    limit=len(names),
                    remedy="Put text with what stands between cells, with quotes or line ends between double quotes.",
                )
            yield number, where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise StageError(
            f"{file} line {line + 1} is not CSV ({error})", remedy="Write a double quote within quotes twice."
        ) from error


def parquet_rows(file: Path) -> Iterator[Row]:
    """The rows of a parquet file.

    Raises:
        StageError: it is none.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(_unpacked(file)) as read:
            number = 0
            for batch in read.iter_batches():
                for row in _python_rows(batch, file, number):
                    number += 1
                    yield number, f"{file} row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise _no_parquet(file, error) from error


def of_lines(file: Path, column: str) -> Iterator[tuple[int, str, Content]]:
    """(number, where it stands, content) of each JSON line; blank lines are none.

    Raises:
        StageError: a malformed line or a missing column; the error names file and line.
    """
    yield from _of_lines(file, lines(file), column)


def of_json(file: Path, column: str) -> Iterator[tuple[int, str, Content]]:
    """Rows of a .json file: those of a list, the one that an object is, or those of JSON lines.

    Raises:
        StageError: it is not JSON, or a row lacks the column.
    """
    text = whole_text(file).strip()
    if not text:
        return
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(f"{file} line {getattr(error, 'lineno', 1)}", error) from error
    if text[end:].strip():
        yield from _of_lines(file, enumerate(text.split("\n"), 1), column)
        return
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        where = f"{file} row {number}"
        yield number, where, content_of(row, column, where)


def is_side_file(file: Path, column: str) -> bool:
    """Whether a .json file holds one object without text, as configurations and indexes of a data set do."""
    try:
        found = json.loads(whole_text(file))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not any(reads(found, name) for name in (column, *CHATS)) and not pair_of(found)


def of_parquet(file: Path, column: str) -> Iterator[tuple[int, str, Content]]:
    """Rows of a parquet file.

    Raises:
        StageError: it is none, or has no such column of text.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(_unpacked(file)) as read:
            columns = _columns(file, read.schema_arrow, column)
            number = 0
            for batch in read.iter_batches(columns=columns):
                for row in _python_rows(batch.select(columns), file, number):
                    number += 1
                    where = f"{file} row {number}"
                    yield number, where, content_of(row, column, where)
    except pyarrow.ArrowInvalid as error:
        raise _no_parquet(file, error) from error


def _no_parquet(file: Path, error: Exception) -> StageError:
    return StageError(f"{file} is no parquet file ({error})", remedy="Fetch the file again.")


def _of_lines(file: Path, numbered: Iterator[tuple[int, str]], column: str) -> Iterator[tuple[int, str, Content]]:
    for number, where, row in _parsed(file, numbered):
        yield number, where, content_of(row, column, where)


def _parsed(file: Path, numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, Any]]:
    for number, line in numbered:
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from error
        yield number, where, row


def _not_json(where: str, error: Exception) -> StageError:
    return StageError(
        f"{where} is not JSON ({error})",
        remedy="One JSON object a line is expected, or in a .json file a list of objects.",
    )


def _unpacked(file: Path) -> Path | BytesIO:
    if not file.name.lower().endswith(PACKED):
        return file
    with opened(file) as stream:
        return BytesIO(stream.read())


def _python_rows(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch that so many rows stand before."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        # Found again one by one, since a batch does not say which it was.
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                break
        raise StageError(
            f"{file} row {before + index + 1} is not UTF-8",
            measured=str(error),
            remedy=f"Leave row {before + index + 1} out.",
        ) from error
    return rows


def _columns(file: Path, schema: Any, column: str) -> list[str]:
    """The columns of a parquet file to read for `column`.

    Raises:
        StageError: there is none, or none of text.
    """
    names = list(schema.names)
    fields = [(field.name, str(field.type), False) for field in schema]
    readable = list(_readable(schema))
    if column in names or column.partition(".")[0] in names:
        if column not in readable and not _is_null(schema, column):
            missing = f"{file} has no text in column {column!r}"
            raise no_text(missing, [*fields, *((name, "", True) for name in readable)])
        return [column if column in names else column.partition(".")[0]]
    if column == TEXT:
        for name in CHATS:
            if name in readable:
                return [name]
        if pair := pair_of(dict.fromkeys(names)):
            return [*pair, *(["input"] if pair[0] == "instruction" and "input" in names else [])]
    raise no_text(f"{file} has no column {column!r}", [*fields, *((name, "", True) for name in readable)])


def _is_null(schema: Any, column: str) -> bool:
    """Whether a column holds nothing but nulls, which has no type of its own."""
    from pyarrow import types

    return column in schema.names and bool(types.is_null(schema.field(column).type))


def _readable(fields: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the parquet columns that hold strings, lists of strings or conversations."""
    from pyarrow import types

    for field in fields:
        kind, name = field.type, f"{prefix}{field.name}"
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
            inner = {part.name for part in kind} if types.is_struct(kind) else set()
            if {"role", "content"} <= inner or {"from", "value"} <= inner:
                yield name
        elif types.is_struct(kind):
            yield from _readable(kind, f"{name}.")
            continue
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            yield name
