"""Bytes of text files as text: gzip, byte order marks, line ends; and what bytes that are not UTF-8 probably are."""

from __future__ import annotations

import codecs
import gzip
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from stages.runtime.contract import StageError

PACKED = ".gz"
_HEAD = 1 << 14
"""So many bytes at the beginning tell an encoding, and so many around bytes that are not UTF-8 what they may be."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # Before UTF-16, whose mark it begins with.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_HANZI = (
    "的一是不了在人有我他這这中大來来上個个國国到說说們们為为子和你地出道也時时年得就那要下以生會会自着著去之過过家學学"
)
_LETTERS = r"(?<=[A-Za-z])[{0}]{{1,2}}(?![{0}])|(?<![{0}])[{0}]{{1,2}}(?=[A-Za-z])|[\u2010-\u2026€«»]|(?<!\w)[¿¡]"
_WEST, _EAST = _LETTERS.format("À-ÿ"), _LETTERS.format("À-ɏ")
_LIKELY = (
    ("WINDOWS-1252", "cp1252", _WEST, 0.6),
    ("WINDOWS-1250", "cp1250", _EAST, 0.6),
    ("MACINTOSH", "mac_roman", _WEST, 0.6),
    ("WINDOWS-1251", "cp1251", "[оеаинтсрвлк]", 0.5),
    ("KOI8-R", "koi8_r", "[оеаинтсрвлк]", 0.5),
    ("CP932", "cp932", "[ぁ-んー、。]", 0.2),
    ("EUC-JP", "euc_jp", "[ぁ-んー、。]", 0.2),
    ("CP949", "cp949", "[이다는의에을를가고은한하지로도기사서그리]", 0.2),
    ("BIG5", "big5", f"[{_HANZI}。]", 0.2),
    ("UTF-16LE", "utf_16_le", f"[{_HANZI}。ぁ-ん]", 0.2),
    ("UTF-16BE", "utf_16_be", f"[{_HANZI}。ぁ-ん]", 0.2),
    ("GB18030", "gb18030", f"[{_HANZI}。]", 0.2),
)
"""The name to iconv, the name to Python, what many characters beyond ASCII are in the right encoding, and how many at
least: letters among ASCII's in the West, the most frequent characters elsewhere. Others give them by chance only."""


@contextmanager
def opened(file: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """A file's bytes, unpacked where its name ends in .gz.

    Raises:
        StageError: what is read within cannot be unpacked.
    """
    packed = file.name.lower().endswith(PACKED)
    try:
        with gzip.open(file) if packed else file.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise StageError(
            f"{file} cannot be unpacked ({error})",
            remedy=f"Fetch the file again; if it is not packed by gzip, take {PACKED} off its name.",
        ) from error


def whole_text(file: Path) -> str:
    """A file's text; lines end in LF whatever they ended in.

    Raises:
        StageError: bytes that are not of the file's encoding, or a NUL; the error names file and line.
    """
    with opened(file) as stream:
        data = stream.read()
    return _decoded(data, file, _encoding(data[:_HEAD]), 1)


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Each line of a file with its number from 1.

    Raises:
        StageError: see `whole_text`.
    """
    with opened(file) as stream:
        encoding = _encoding(stream.read(_HEAD))
        stream.seek(0)
        # What ends a line in UTF-16 and UTF-32 is more than one byte, at even places.
        pieces = iter(stream) if encoding == "utf-8" else iter([stream.read()])
        number = 0
        for piece in pieces:
            for line in _decoded(piece, file, encoding, number + 1).removesuffix("\n").split("\n"):
                number += 1
                yield number, line


def in_lf(text: str) -> str:
    """The text with every CRLF and CR as LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(head: bytes) -> str:
    """By its mark, or where every other byte is NUL as in UTF-16 of Western text; UTF-8 otherwise."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    quarter = len(head) // 4
    nuls = [head[place : quarter * 4 : 4].count(0) / quarter if quarter else 0.0 for place in range(4)]
    if nuls[3] == 1 and nuls[2] > 0.7:
        return "utf-32-le"
    if nuls[0] == 1 and nuls[1] > 0.7:
        return "utf-32-be"
    if nuls[0] == nuls[2] == 0 and min(nuls[1], nuls[3]) > 0.7:
        return "utf-16-le"
    if nuls[1] == nuls[3] == 0 and min(nuls[0], nuls[2]) > 0.7:
        return "utf-16-be"
    return "utf-8"


def _decoded(data: bytes, file: Path, encoding: str, first_line: int) -> str:
    try:
        text = in_lf(data.decode(encoding).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        before = in_lf(data[: error.start].decode(encoding, "ignore"))
        raise StageError(
            f"{file} line {first_line + before.count(chr(10))} is not {_spelt(encoding)}",
            measured=f"byte 0x{data[error.start]:02x}",
            remedy=_remedy(file, encoding),
        ) from error
    if (at := text.find("\0")) >= 0:
        raise StageError(
            f"{file} line {first_line + text.count(chr(10), 0, at)} holds a NUL character",
            remedy=_remedy(file, encoding),
        )
    return text


def _remedy(file: Path, encoding: str) -> str:
    """What makes UTF-8 of a file that is not wholly in the encoding that it seemed to be in."""
    with opened(file) as stream:
        data = stream.read()
    if data.startswith(b"\x1f\x8b"):
        return f"It is packed by gzip: name it {file.name}{PACKED}."
    if data.startswith((b"PK\x03\x04", b"%PDF")):
        return "It is no text but a document or an archive: give the text that is in it."
    if encoding != "utf-8":
        return f"Write it again as UTF-8, without what is broken: {_iconv(file, _spelt(encoding), leave_out=True)}"
    if wide := _wide(data):
        return f"It seems to be {wide}. Convert it: {_iconv(file, wide)}"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1 if error.start > _HEAD else 0
        name = _likely(data[start:][:_HEAD])
    else:
        read = "zcat" if file.name.lower().endswith(PACKED) else "cat"
        return f"Take the NULs out: {read} {shlex.quote(str(file))} | tr -d '\\000' > {_beside(file)}"
    if name == "UTF-8":
        return f"Most of it is UTF-8. Leave out what is broken: {_iconv(file, name, leave_out=True)}"
    if name:
        return f"It seems to be {name}. Convert it: {_iconv(file, name)}"
    return (
        "Find out in which encoding it was written and save it as UTF-8: iconv -l lists them, iconv -f NAME -t UTF-8."
    )


def _spelt(encoding: str) -> str:
    """An encoding as iconv writes it: UTF-16LE."""
    return encoding.upper().replace("-LE", "LE").replace("-BE", "BE")


def _iconv(file: Path, name: str, *, leave_out: bool = False) -> str:
    left = "-c " if leave_out else ""
    if file.name.lower().endswith(PACKED):
        return f"zcat {shlex.quote(str(file))} | iconv {left}-f {name} -t UTF-8 > {_beside(file)}"
    return f"iconv {left}-f {name} -t UTF-8 {shlex.quote(str(file))} > {_beside(file)}"


def _beside(file: Path) -> str:
    """A new file in the folder where the command runs: downloads are not to be changed."""
    name = Path(file.name[: -len(PACKED)] if file.name.lower().endswith(PACKED) else file.name)
    return shlex.quote(f"{name.stem}.utf8{name.suffix}")


def _wide(data: bytes) -> str | None:
    """UTF-16 by NULs that stand at even or at odd places only, among bytes that are no letters there."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 2 or bool(even) == bool(odd):
        return None
    high = data[1::2] if odd else data[::2]
    letters = sum(high.count(letter) for letter in b"abcdefghijklmnopqrstuvwxyz ")
    return None if letters * 2 > len(high) else "UTF-16LE" if odd else "UTF-16BE"


def _likely(data: bytes) -> str | None:
    """The name, to iconv, of the encoding that gives the likeliest text, or None where none is likely."""
    broken = data.decode(errors="replace")
    beyond = [character for character in broken if character > "\x7f"]
    if beyond.count("\ufffd") * 2 < len(beyond):
        return "UTF-8"
    shares = {name: _share(data, codec, usual) for name, codec, usual, _ in _LIKELY}
    enough = [name for name, _, _, least in _LIKELY if shares[name] >= least]
    return max(enough, key=lambda name: shares[name], default=None)


def _share(data: bytes, codec: str, usual: str) -> float:
    """Of the characters beyond ASCII in this encoding, those that are usual in a text; 0 where it is none."""
    try:
        # A character that the sample's end cuts is left out.
        text = codecs.getincrementaldecoder(codec)().decode(data)
    except UnicodeDecodeError:
        return 0.0
    beyond = sum(character > "\x7f" for character in text)
    return sum(len(found) for found in re.findall(usual, text)) / beyond if beyond else 0.0
