"""An artifact goes to S3 and back while each process that moves it is killed once in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages.adapters.s3.client import client, parse
from stages.runtime.contract import Kind, Manifest, Provenance, Work
from stages.runtime.fingerprint import digest_file, entries, fingerprint

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Moved:
    """What the second process of a transfer found and what it took."""

    kept: int
    took: dict[str, Any]


def random_file(path: Path, size: int, random_bytes: bytes) -> None:
    """A file in which no two parts are equal, written as fast as the disk takes it."""
    path.parent.mkdir(parents=True)
    with path.open("wb") as out:
        for number in range(-(-size // len(random_bytes))):
            out.write(number.to_bytes(8) + random_bytes[8:])
        out.truncate(size)


def there_and_back(
    root: str,
    folder: Path,
    part_bytes: int,
    around_first: Callable[[subprocess.Popen[bytes], Callable[[], int]], None],
) -> tuple[Moved, Moved]:
    """Publish `folder/draft/weights`, check it out, each in two processes of which `around_first` ends the first."""
    weights = folder / "draft" / "weights"
    work = Work(stage="fetch", code="c", params={}, inputs={}, requires={})
    about = Provenance(host="h", device="d", created="2026-01-01T00:00:00+00:00", seconds=1, peak_rss_bytes=1)
    files = entries(weights.parent)
    manifest = Manifest(work=work, kind=Kind.CHECKPOINT, files=files, metrics={}, provenance=about)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    building = folder / "scratch" / "views" / f".view-{fingerprint(work)}"
    view = building.with_name(fingerprint(work))

    def transfer(what: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.services.transfer", what, root, str(folder / "scratch")]
        command += [str(folder / "manifest.json"), str(weights.parent), str(part_bytes)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)

    def twice(what: str, stored: Callable[[], int]) -> Moved:
        with transfer(what) as first:
            around_first(first, stored)
            first.wait()
        assert first.returncode == -9
        time.sleep(0.5)  # the server may still be taking in what had reached it
        kept = stored()
        with transfer(what) as second:
            said = second.communicate()[0]
        assert second.returncode == 0
        return Moved(kept, json.loads(said))

    up = twice("publish", lambda: _bytes_of_parts(root))
    assert _bytes_of_parts(root) == 0, "no upload is left"
    down = twice("checkout", lambda: sum(path.stat().st_size for path in building.glob("*.part")))
    assert digest_file(view / "weights") == digest_file(weights) == files["weights"].sha256
    assert [path.name for path in view.parent.iterdir() if path.is_dir()] == [view.name]
    return up, down


def kill_at(share: float, total: int) -> Callable[[subprocess.Popen[bytes], Callable[[], int]], None]:
    """End a process once so much of its transfer is where it goes."""

    def end(process: subprocess.Popen[bytes], stored: Callable[[], int]) -> None:
        deadline = time.monotonic() + 120
        while stored() < share * total:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"it ended before it was killed: {process.returncode}")
            time.sleep(0.01)
        process.kill()

    return end


def _bytes_of_parts(root: str) -> int:
    bucket, prefix = parse(root)
    found = 0
    for upload in client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", []):
        parts = client().list_parts(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        found += sum(one["Size"] for one in parts.get("Parts", []))
    return found
