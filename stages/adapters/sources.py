"""Sources named in params, brought to this machine: file://, pypi://, hf://, s3://.

A source is first *resolved*, so that it names bytes and not a moving label, then downloaded into a folder of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.runtime.contract import Pins, Progress, StageError, Unavailable
from stages.runtime.transfers import locked

SCHEMES = ("file", "pypi", "hf", "s3")


@dataclass(frozen=True)
class Wanted:
    """What is looked for in a source.

    Attributes:
        purpose: parts downloads of one source for different uses.
        patterns: file names that count in a folder, as `fnmatch` patterns.
        remedy: what a source may hold, for the error when nothing is found.
    """

    purpose: str
    patterns: tuple[str, ...]
    remedy: str

    def takes(self, name: str) -> bool:
        """Whether a file of this relative path counts, in capitals or not."""
        own = name.rpartition("/")[2].lower()
        return any(fnmatchcase(own, pattern.lower()) for pattern in self.patterns)


@dataclass(frozen=True)
class Pinned:
    """A source whose content is known: its digest, its exact name and the folder that downloads go to."""

    digest: str
    exact: str
    downloads: str


def scheme_of(source: str) -> str:
    """The scheme of a source; a bare path is a file.

    Raises:
        StageError: the scheme is unknown.
    """
    scheme = source.partition("://")[0] if "://" in source else "file"
    if scheme not in SCHEMES:
        raise StageError(
            f"no source speaks {scheme}://",
            limit=", ".join(f"{known}://" for known in SCHEMES),
            remedy="Give a path or one of these.",
        )
    return scheme


def pin_source(source: str, wanted: Wanted, digest_of: Callable[[Path], str], pins: Pins, progress: Progress) -> Pinned:
    """The digest of a source's content, from memory where the source cannot have changed.

    Raises:
        StageError: nothing is there, or it is not what is wanted.
        Unavailable: the network is needed and does not answer.
    """
    if scheme_of(source) == "file":
        return Pinned(digest_of(local_path(source)), source, "")
    exact = _resolve(source, wanted, pins, progress)
    key = f"{wanted.purpose} {exact}"
    digest = pins.recall(key)
    if digest is None:
        digest = digest_of(download(exact, wanted, pins.downloads, progress))
        pins.remember(key, digest)
    return Pinned(digest, exact, str(pins.downloads))


def open_source(exact: str, wanted: Wanted, downloads: str, spare: Path, progress: Progress) -> Path:
    """The file or folder of a pinned source, downloaded again into `spare` when its download is gone."""
    if scheme_of(exact) == "file":
        return local_path(exact)
    return downloaded(exact, wanted, downloads) or download(exact, wanted, spare, progress)


def downloaded(exact: str, wanted: Wanted, downloads: str) -> Path | None:
    """What an earlier download of a pinned source left, None where there was none or it is gone."""
    folder = Path(downloads) / _folder_name(exact, wanted)
    return content(folder) if downloads and folder.is_dir() else None


def local_path(source: str) -> Path:
    """The path of a file:// URI or a bare path.

    Raises:
        StageError: nothing is there.
    """
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source).expanduser()
    if not path.exists():
        raise StageError(f"there is no file or folder {path}", remedy="Check the path in `source`.")
    return path.absolute()


def download(exact: str, wanted: Wanted, downloads: Path, progress: Progress) -> Path:
    """Bring a resolved source below `downloads` once; an interrupted download goes on where it was."""
    name = _folder_name(exact, wanted)
    folder, part = downloads / name, downloads / f"{name}.part"
    downloads.mkdir(parents=True, exist_ok=True)
    with locked(downloads / f"{part.name}.lock"):
        if not folder.is_dir():
            part.mkdir(exist_ok=True)
            _fetch_into(part, exact, wanted, progress)
            part.rename(folder)
    return content(folder)


def content(folder: Path) -> Path:
    """What a download holds: the folder `tree`, or the one file below `file`."""
    tree = folder / "tree"
    return tree if tree.is_dir() else next((folder / "file").iterdir())


def _fetch_into(part: Path, exact: str, wanted: Wanted, progress: Progress) -> None:
    # Each vendor's library is imported only for its own scheme: `corpus` of a local text needs no hub and no S3.
    match scheme_of(exact):
        case "pypi":
            from stages.adapters import pypi

            pypi.download(exact, part, wanted.takes, progress)
        case "hf":
            from stages.adapters import hub

            hub.download(exact, part, wanted.takes, progress)
        case _:
            from stages.adapters.s3 import source as s3_source

            s3_source.download(exact, part, wanted.takes, progress)
    if not any((part / "file").glob("*")) and not any((part / "tree").rglob("*")):
        raise StageError(f"{exact} holds nothing of use", remedy=wanted.remedy)


def _resolve(source: str, wanted: Wanted, pins: Pins, progress: Progress) -> str:
    """A source as the name of unchanging bytes; without network, as it was resolved last."""
    scheme = scheme_of(source)
    if scheme == "pypi":
        from stages.adapters import pypi

        pypi.parse(source)
        return source
    if scheme == "hf" and re.search(r"@[0-9a-f]{40}(/|$)", source):
        return source
    key = f"resolved {wanted.purpose} {source}"
    try:
        if scheme == "hf":
            from stages.adapters import hub

            exact = hub.resolve(source)
        else:
            from stages.adapters.s3 import source as s3_source

            exact = s3_source.resolve(source, wanted.takes)
    except Unavailable as error:
        known = pins.recall(key)
        if known is None:
            raise
        progress.note(f"{source} cannot be reached ({error.what}); going on with what it was last: {known}")
        return known
    pins.remember(key, exact)
    return exact


def _folder_name(exact: str, wanted: Wanted) -> str:
    return hashlib.sha256(f"{wanted.purpose} {exact}".encode()).hexdigest()[:32]


def changed_source(source: str, found: str, asked: str) -> StageError:
    """The error for content that is no longer what was pinned."""
    return StageError(
        f"{source} is not what it was when its digest was taken",
        measured=found[:12],
        limit=asked[:12],
        remedy="Run again to take it as it is now, or remove `digest` from the step's params.",
    )
