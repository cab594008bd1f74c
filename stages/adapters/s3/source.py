"""s3://bucket/prefix as a source of checkpoints and text: one object, or those below a prefix that count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.adapters.s3.client import fetch_object, listed, parse
from stages.runtime.contract import Progress, StageError
from stages.runtime.fingerprint import canonical, digest_bytes


def resolve(source: str, takes: Callable[[str], bool]) -> str:
    """The source with a digest of names, sizes and ETags after `#`: the same as long as no object changed.

    Raises:
        StageError: there is nothing, or one may not read it.
        Unavailable: the server does not answer.
    """
    return f"{source}#{_state(_members(source, takes))}"


def download(exact: str, part: Path, takes: Callable[[str], bool], progress: Progress) -> None:
    """Bring the objects of a resolved source; what is whole is kept and what is cut short goes on.

    Raises:
        StageError: an object changed since the source was resolved.
    """
    source, _, state = exact.rpartition("#")
    bucket, key = parse(source)
    members = _members(source, takes)
    if _state(members) != state:
        raise StageError(f"{source} changed while it was fetched", remedy="Run again to take it as it is now.")
    total, done = sum(size for _, size, _, _ in members), 0

    def arrived(count: int) -> None:
        nonlocal done
        done += count
        progress.advanced(done, total)

    for name, size, _, _ in members:
        single = name == key
        target = part / "file" / Path(name).name if single else part / "tree" / name.removeprefix(f"{key}/")
        if target.is_file():
            arrived(size)
        else:
            fetch_object(bucket, name, target, arrived)


def _members(source: str, takes: Callable[[str], bool]) -> list[tuple[str, int, float, str]]:
    bucket, key = parse(source)
    found = [one for one in listed(bucket, key) if one[0] == key] if key else []
    found = found or [one for one in listed(bucket, f"{key}/" if key else "") if takes(one[0])]
    if not found:
        raise StageError(f"{source} holds nothing of use", remedy="Check bucket and prefix in `source`.")
    return found


def _state(members: list[tuple[str, int, float, str]]) -> str:
    return digest_bytes(canonical([[name, size, etag] for name, size, _, etag in members]))[:16]
