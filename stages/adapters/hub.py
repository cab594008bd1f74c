"""hf://org/name@revision[/path] and hf://datasets/org/name@revision[/path]: files of a hub repository at one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from stages.runtime.contract import Progress, StageError, Unavailable
from stages.runtime.fingerprint import digest_bytes, digest_file


@dataclass(frozen=True)
class Repository:
    """A repository, its revision and a file or folder inside; an empty path is all of it."""

    kind: str
    name: str
    revision: str
    inside: str

    def __str__(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        inside = f"/{self.inside}" if self.inside else ""
        return f"hf://{kind}{self.name}@{self.revision}{inside}"


def parse(source: str) -> Repository:
    """Take an hf:// source apart; the revision is `main` when none is given, and `%2F` stands for a slash in it.

    Raises:
        StageError: it has another form.
    """
    name = r"[\w.-]+/[\w.-]+"
    parts = re.fullmatch(rf"hf://(datasets/)?({name})(?:@([^/@]+))?(?:/(.*))?", source)
    if not parts:
        raise StageError(
            f"{source} names no repository of the hub",
            limit="hf://org/name@revision or hf://datasets/org/name@revision/path",
            remedy="Write it in this form.",
        )
    kind = "dataset" if parts[1] else "model"
    return Repository(kind, parts[2], unquote(parts[3] or "main"), (parts[4] or "").strip("/"))


def resolve(source: str) -> str:
    """The same source at the commit that its revision means now.

    Raises:
        StageError: there is no such repository or revision, or one may not read it.
        Unavailable: the hub does not answer.
    """
    asked = parse(source)
    with _spoken(source):
        commit = HfApi().repo_info(asked.name, revision=asked.revision, repo_type=asked.kind).sha
    return str(replace(asked, revision=commit))


def download(source: str, part: Path, takes: Callable[[str], bool], progress: Progress) -> None:
    """Bring the files that count into `part/tree`, or the one file that is named into `part/file`.

    What was brought before is kept, and a file cut short goes on where it ended.
    """
    asked = parse(source)
    with _spoken(source):
        info = HfApi().repo_info(asked.name, revision=asked.revision, repo_type=asked.kind, files_metadata=True)
        sizes = {found.rfilename: found.size or 0 for found in info.siblings or []}
        single = asked.inside in sizes
        names = [asked.inside] if single else _below(sizes, asked.inside, takes)
        bar = _bar_class(progress, sum(sizes[name] for name in names))
        for name in names:
            inside = name.removeprefix(f"{asked.inside}/")
            target = part / "file" / Path(name).name if single else part / "tree" / inside
            if target.is_file():
                bar(initial=sizes[name])
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                _download_file(hf_hub_url(asked.name, name, repo_type=asked.kind, revision=asked.revision), target, bar)


def _download_file(url: str, target: Path, bar: type[Any]) -> None:
    # The hub's own client begins a file again after the process ended; only its reader takes up a partial file.
    headers = build_hf_headers()
    served = get_hf_file_metadata(url, headers=headers)
    if urlsplit(served.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)
    etag = served.etag or ""
    part = target.with_name(f"{target.name}.{digest_bytes(etag.encode())[:8]}.part")
    with part.open("ab") as stream:
        http_get(
            served.location,
            stream,
            resume_size=part.stat().st_size,
            headers=headers,
            expected_size=served.size,
            tqdm_class=bar,
        )
        stream.flush()
        os.fsync(stream.fileno())
    # Large files are named by their sha256; small ones by git's digest, which is another.
    if re.fullmatch("[0-9a-f]{64}", etag) and digest_file(part) != etag:
        part.unlink()
        raise Unavailable(f"{url} arrived damaged", limit=etag[:12], remedy="Run again to fetch it anew.")
    part.rename(target)


def _below(sizes: dict[str, int], inside: str, takes: Callable[[str], bool]) -> list[str]:
    prefix = f"{inside}/" if inside else ""
    names = sorted(name for name in sizes if name.startswith(prefix) and takes(name))
    # Some repositories carry the same weights twice, under a vendor's own file names beside the usual ones.
    if any(name == f"{prefix}model.safetensors" or name.endswith(".safetensors.index.json") for name in names):
        names = [n for n in names if not n.endswith(".safetensors") or n.rpartition("/")[2].startswith("model")]
    return names


def _bar_class(progress: Progress, total: int) -> type[Any]:
    """What the hub takes for a tqdm class, telling a listener the bytes of all files together."""
    done = 0

    class Bar:
        def __init__(self, initial: int = 0, **_: Any) -> None:
            self.update(initial)

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done += int(n or 0)
            progress.advanced(min(done, total), total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return Bar


@contextmanager
def _spoken(source: str) -> Iterator[None]:
    """The hub's errors as ours: what a person must mend, and what another try may mend."""
    try:
        yield
    except GatedRepoError as error:
        raise StageError(
            f"{source} is gated", remedy="Accept its terms on the hub and log in: hf auth login, or set $HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise StageError(
            f"the hub has no {source}, or hides it",
            remedy="Check the name and the revision; a private one needs hf auth login or $HF_TOKEN.",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 429 or status >= 500:
            raise Unavailable(f"the hub failed on {source}", measured=f"HTTP {status}") from error
        raise StageError(f"the hub refuses {source}", measured=f"HTTP {status}", remedy="Check $HF_TOKEN.") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as error:
        raise Unavailable(
            f"the hub does not answer for {source}",
            measured=type(error).__name__,
            remedy="Check the network, $HF_ENDPOINT and $HF_HUB_OFFLINE.",
        ) from error
