"""Documents out of text files, and the two texts that every installation has."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.adapters import row_files
from stages.runtime.contract import Progress, StageError
from stages.runtime.encodings import PACKED, whole_text
from stages.runtime.fingerprint import canonical, constraints, digest_bytes, digest_file
from stages.runtime.rows import Message

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
PATTERNS = tuple(f"*{suffix}{packed}" for suffix in FORMATS for packed in ("", PACKED))
_SENTENCES = re.compile(r"((?<=[.!?]) +|(?<=[。！？])(?![”’」』）])\s*|(?<=[。！？][”’」』）])\s*)")
"""Between two sentences; in Chinese and Japanese nothing need stand there."""
GENERATED = ("pydoc://topics", "descriptions://constraints")
REMEDY = "Give a .txt, .md, .jsonl, .json or .parquet file, any of them with .gz, or a folder of them."


@dataclass(frozen=True)
class Document:
    """A text or a conversation, and its name inside the source, which does not depend on where the source lies."""

    name: str
    text: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Null:
    """A row that has nothing where its text should stand."""

    where: str


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
    return digest_bytes(canonical([[name, _format(file), digest_file(file)] for name, file in text_files(path)]))


def text_files(path: Path) -> list[tuple[str, Path]]:
    """(name inside the source, file) of each text file at a path, in order of names.

    A suffix counts in any case and is named in lower case, unless two files would bear one name.

    Raises:
        StageError: there is none.
    """
    if path.is_file():
        found = [("", path)] if _format(path) else []
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and _format(p))
        names = [file.relative_to(path).as_posix() for file in files]
        plain = [f"{name[: -len(_suffix(name))]}{_suffix(name)}" for name in names]
        often = Counter(plain)
        found = [(low if often[low] == 1 else name, file) for name, low, file in zip(names, plain, files, strict=True)]
    if not found:
        raise StageError(f"{path} holds no text", limit=f"{', '.join(FORMATS)}, and with {PACKED}", remedy=REMEDY)
    return found


def documents(path: Path, column: str, progress: Progress) -> Iterator[Document | Null]:
    """The documents of a file or a folder of files.

    Args:
        path: a text file is one document, a row of jsonl, json or parquet is one document.
        column: the field that holds the text; where rows have no `text`, their conversations are taken for it.
        progress: told which .json files of a folder are taken for no text.

    Raises:
        StageError: bytes that are no text, a malformed line or a missing column; the error names file and line.
    """
    for name, file in text_files(path):
        match _format(file).removesuffix(PACKED):
            case "text":
                yield Document(name, whole_text(file))
                continue
            case "jsonl":
                rows = row_files.of_lines(file, column)
            case "json":
                if name and row_files.is_side_file(file, column):
                    progress.note(f"{file} is one object without text: taken for a description of the others, left out")
                    continue
                rows = row_files.of_json(file, column)
            case _:
                rows = row_files.of_parquet(file, column)
        for number, where, content in rows:
            named = f"{name}:{number}" if name else str(number)
            if content is None:
                yield Null(where)
            elif isinstance(content, str):
                yield Document(named, content)
            else:
                yield Document(named, "\n\n".join(message.content for message in content), content)


def _suffix(name: str) -> str:
    """What a file's name ends in, as FORMATS has it and with .gz where it is packed; empty where it is no text."""
    low = name.lower()
    packed = PACKED if low.endswith(PACKED) else ""
    suffix = Path(low.removesuffix(PACKED)).suffix
    return f"{suffix}{packed}" if suffix in FORMATS else ""


def _format(file: Path) -> str:
    suffix = _suffix(file.name)
    packed = PACKED if suffix.endswith(PACKED) else ""
    return f"{FORMATS[suffix.removesuffix(PACKED)]}{packed}" if suffix else ""


@dataclass(frozen=True)
class Paragraph:
    """A part of a document, and what stood between it and the part before."""

    text: str
    glue: str = "\n\n"
    messages: tuple[Message, ...] = ()

    @property
    def compared(self) -> str:
        """What makes it a duplicate of another one: a conversation without what the system says, which many share."""
        spoken = [message.content for message in self.messages if message.role != "system"]
        return "\n\n".join(spoken) if any(part.strip() for part in spoken) else self.text


def parts(document: Document, longest: int) -> Iterator[Paragraph]:
    """A conversation whole, a text by its paragraphs (see there)."""
    if not document.messages:
        yield from paragraphs(document.text, longest)
    elif document.text.strip():
        yield Paragraph(document.text, messages=document.messages)


def paragraphs(text: str, longest: int) -> Iterator[Paragraph]:
    """The parts of a text between blank lines.

    Args:
        text: of one document.
        longest: a part of more characters is taken line by line, a line that is longer sentence by sentence, and such a
            sentence by its words or characters, since text without blank lines would otherwise be one paragraph.
    """
    for part in re.split(r"\n[ \t]*\n", text):
        if len(part) <= longest:
            if part.strip():
                yield Paragraph(part.strip("\n"), "\n\n")
            continue
        for number, line in enumerate(part.strip("\n").split("\n")):
            glue = "\n" if number else "\n\n"
            for piece, between in _pieces(line, longest):
                if piece.strip():
                    yield Paragraph(piece, glue)
                glue = between


def _pieces(line: str, longest: int) -> Iterator[tuple[str, str]]:
    """A line in pieces, each with what stands behind it."""
    if len(line) <= longest:
        yield line, ""
        return
    *whole, last = _SENTENCES.split(line)
    for sentence, between in [*zip(whole[::2], whole[1::2], strict=True), (last, "")]:
        while len(sentence) > longest:
            at = sentence.rfind(" ", 1, longest + 1)
            yield sentence[: at if at > 0 else longest], " " if at > 0 else ""
            sentence = sentence[at + 1 if at > 0 else longest :]
        yield sentence, " " if between else ""
