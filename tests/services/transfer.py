"""A process of its own that publishes or checks out one artifact, and says what that took.

python -m tests.services.transfer publish|checkout STORE SCRATCH MANIFEST DRAFT PART_BYTES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stages.adapters.connect import connect
from stages.adapters.s3 import multipart as s3_multipart
from stages.adapters.s3.client import client
from stages.runtime.contract import Manifest
from stages.runtime.fingerprint import fingerprint
from stages.runtime.peak_memory import peak_rss_bytes
from stages.runtime.progress import Silent


class Heard(Silent):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.points: list[tuple[float, float]] = []

    def advanced(self, done: float, total: float) -> None:
        self.points.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def main(what: str, uri: str, scratch: str, manifest: str, draft: str, part_bytes: str) -> None:
    s3_multipart.PART_BYTES = int(part_bytes)
    sent, got = [], []

    def sending(request: Any, **_: object) -> None:
        sent.append(int(request.headers["Content-Length"]))

    def answered(parsed: Any, **_: object) -> None:
        if "ContentRange" in parsed:
            got.append(parsed["ContentLength"])

    client().meta.events.register("before-send.s3.UploadPart", sending)
    client().meta.events.register("after-call.s3.GetObject", answered)
    store, heard = connect(uri, Path(scratch)), Heard()
    made = Manifest.model_validate_json(Path(manifest).read_bytes())
    if what == "publish":
        store.publish(Path(draft), made, progress=heard)
    else:
        store.checkout(fingerprint(made.work), heard)
    took = {"sent": sum(sent), "got": sum(got), "peak_rss_bytes": peak_rss_bytes()}
    sys.stdout.write(json.dumps({**took, "notes": heard.notes, "points": heard.points[-1:]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
