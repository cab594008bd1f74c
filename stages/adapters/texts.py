"""Documents out of text files, and the two texts that every installation has."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.runtime.contract import StageError
from stages.runtime.fingerprint import canonical, constraints, digest_bytes, digest_file

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
PATTERNS = tuple(f"*{suffix}" for suffix in FORMATS)
GENERATED = ("pydoc://topics", "descriptions://constraints")
_REMEDY = "Give a .txt, .md, .jsonl or .parquet file or a folder of them."


@dataclass(frozen=True)
class Document:
    """A text and its name inside the source, which does not depend on where the source lies."""

    name: str
    text: str


def generated(source: str) -> list[Document]:
    """A text that comes with the installation, documents in order of their names.

    `pydoc://topics` is the reference prose of this Python; `descriptions://constraints` are the long descriptions of
    the libraries of constraints.txt that are installed in the pinned version.
    """
    if source == "pydoc://topics":
        from pydoc_data.topics import topics

        return [Document(name, topics[name]) for name in sorted(topics)]
    return list(_descriptions())


def _descriptions() -> Iterator[Document]:
    for name, version in sorted(constraints().items()):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.split("+")[0] != version.split("+")[0]:
            continue
        # The body of the metadata is the long description; old formats have it as an indented header.
        text = found.metadata.get_payload() or found.metadata.get("Description", "")  # type: ignore[attr-defined]
        if text.strip():
            yield Document(name, text.replace("\r\n", "\n"))


def digest_of_documents(documents: list[Document]) -> str:
    """The identity of documents that lie in no file."""
    return digest_bytes(canonical([[document.name, document.text] for document in documents]))


def digest_of_files(path: Path) -> str:
    """The identity of text files: names below the folder, format and bytes. A single file's own name does not count."""
    return digest_bytes(canonical([[name, FORMATS[file.suffix], digest_file(file)] for name, file in text_files(path)]))


def text_files(path: Path) -> list[tuple[str, Path]]:
    """(name inside the source, file) of each text file at a path, in order of names.

    Raises:
        StageError: there is none.
    """
    if path.is_file():
        found = [("", path)] if path.suffix in FORMATS else []
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in FORMATS)
        found = [(file.relative_to(path).as_posix(), file) for file in files]
    if not found:
        raise StageError(f"{path} holds no text", limit=", ".join(FORMATS), remedy=_REMEDY)
    return found


def documents(path: Path, column: str) -> Iterator[Document]:
    """The documents of a file or a folder of files.

    Args:
        path: a text file is one document, a row of jsonl or parquet is one document.
        column: the field that holds the text.

    Raises:
        StageError: bytes that are not UTF-8, a malformed line or a missing column; the error names file and line.
    """
    for name, file in text_files(path):
        match FORMATS[file.suffix]:
            case "text":
                yield Document(name, _decoded(file.read_bytes(), file))
            case "jsonl":
                yield from _rows_of_jsonl(name, file, column)
            case _:
                yield from _rows_of_parquet(name, file, column)


def _decoded(data: bytes, file: Path, line: int | None = None) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = line or data.count(b"\n", 0, error.start) + 1
        raise StageError(
            f"{file} line {where} is not UTF-8",
            measured=f"byte 0x{data[error.start]:02x}",
            remedy="Convert the file: iconv -f latin1 -t utf-8.",
        ) from error
    return text.replace("\r\n", "\n")


def _rows_of_jsonl(name: str, file: Path, column: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decoded(line, file, number))
            except ValueError as error:
                raise StageError(
                    f"{file} line {number} is not JSON ({error})", remedy="One JSON object a line is expected."
                ) from error
            text = row.get(column) if isinstance(row, dict) else None
            if not isinstance(text, str):
                has = ", ".join(sorted(row)[:8]) if isinstance(row, dict) else type(row).__name__
                raise StageError(
                    f"{file} line {number} has no text in {column!r}",
                    measured=f"it has {has}",
                    remedy="Name the field that holds the text: params.column.",
                )
            yield Document(f"{name}:{number}" if name else str(number), text.replace("\r\n", "\n"))


def _rows_of_parquet(name: str, file: Path, column: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            if column not in opened.schema_arrow.names:
                raise StageError(
                    f"{file} has no column {column!r}",
                    measured=f"it has {', '.join(opened.schema_arrow.names[:8])}",
                    remedy="Name the column that holds the text: params.column.",
                )
            number = 0
            for batch in opened.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None and not isinstance(text, str):
                        raise StageError(
                            f"{file} row {number} has no text in {column!r}",
                            measured=type(text).__name__,
                            remedy="Name a column of strings: params.column.",
                        )
                    yield Document(f"{name}:{number}" if name else str(number), text or "")
    except pyarrow.ArrowInvalid as error:
        raise StageError(f"{file} is no parquet file ({error})", remedy="Fetch the file again.") from error


@dataclass(frozen=True)
class Paragraph:
    """A part of a document, and what stood between it and the part before."""

    text: str
    glue: str = "\n\n"


def paragraphs(text: str, longest: int) -> Iterator[Paragraph]:
    """The parts of a text between blank lines.

    Args:
        text: of one document.
        longest: a part of more characters is taken line by line, and a line that is longer sentence by sentence, since
            text without blank lines would otherwise be one paragraph.
    """
    for part in re.split(r"\n[ \t]*\n", text):
        if len(part) <= longest:
            yield from _filled([part.strip("\n")], "\n\n", "\n\n")
            continue
        for number, line in enumerate(part.strip("\n").split("\n")):
            sentences = re.split(r"(?<=[.!?]) +", line) if len(line) > longest else [line]
            yield from _filled(sentences, "\n" if number else "\n\n", " ")


def _filled(parts: list[str], first: str, glue: str) -> Iterator[Paragraph]:
    for number, part in enumerate(parts):
        if part.strip():
            yield Paragraph(part, glue if number else first)
