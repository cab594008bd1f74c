"""hf:// sources, against a server on loopback that speaks the hub's few endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stages.adapters import hub
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import digest_bytes

COMMIT, LATER = "a" * 40, "b" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 60_000,  # more than the 10 MB that the hub's reader writes at once
    "consolidated.safetensors": b"the same under another name",
    "pytorch_model.bin": b"pickle",
    "data/a.jsonl": b'{"text": "a"}\n',
}
CHILD = """
import dataclasses, json, sys
from pathlib import Path
from stages.adapters.connect import FilePins
from stages.adapters.sources import Wanted, download, pin_source
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import digest_file, digest_tree
from stages.runtime.progress import JsonLines
wanted = Wanted("test", ("*.json", "*.safetensors", "*.jsonl"), "")
pins = FilePins(Path(sys.argv[2]))
digest = lambda path: digest_tree(path) if path.is_dir() else digest_file(path)
try:
    pinned = pin_source(sys.argv[1], wanted, digest, pins, JsonLines(sys.stdout))
    path = download(pinned.exact, wanted, pins.downloads, JsonLines(sys.stdout))
    print(json.dumps({"pinned": dataclasses.asdict(pinned), "path": str(path)}))
except StageError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


class Hub:
    """Repository org/name: `main` is at `head`, and answers can be broken off or refused."""

    def __init__(self) -> None:  # noqa: C901 - the handler's methods are counted as its own
        self.head = COMMIT
        self.status = 200
        self.cut_after: int | None = None
        self.requests: list[tuple[str, str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
                if hub.status != 200:
                    return self.answer(hub.status, b"{}")
                path = self.path.partition("?")[0]
                if path.startswith("/api/"):
                    return self.api(path)
                return self.file(path)

            do_HEAD = do_GET

            def api(self, path: str) -> None:
                if not path.startswith(("/api/models/org/name", "/api/datasets/org/name")):
                    return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
                revision = path.partition("/revision/")[2] or "main"
                if revision not in ("main", COMMIT, LATER):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                sha = hub.head if revision == "main" else revision
                found = {"id": "org/name", "sha": sha, "siblings": siblings, "private": False, "tags": []}
                return self.answer(200, json.dumps(found | {"downloads": 0, "likes": 0}).encode())

            def file(self, path: str) -> None:
                commit, _, name = path.partition("/resolve/")[2].partition("/")
                data = FILES[name]
                headers = {"ETag": f'"{digest_bytes(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                status, span = 200, self.headers.get("Range")
                if span:
                    start = int(span.removeprefix("bytes=").partition("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    status, data = 206, data[start:]
                return self.answer(status, data, headers)

            def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.cut_after is not None and len(data) > hub.cut_after:
                    self.wfile.write(data[: hub.cut_after])
                    hub.status, self.close_connection = 503, True
                    return
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server() -> Iterator[Hub]:
    made = Hub()
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(source: str, scratch: Path, endpoint: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The child's answer and its events: the hub reads its settings once a process."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(scratch / "home"), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, str(scratch)],
        env=os.environ | settings | {"HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *events, last = map(json.loads, done.stdout.splitlines())
    return last, events


def tree(path: str) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def test_branch_becomes_a_commit_and_goes_on_without_network(server: Hub, tmp_path: Path) -> None:
    first, events = ask("hf://org/name@main", tmp_path, server.url)
    assert first["pinned"]["exact"] == f"hf://org/name@{COMMIT}"
    assert tree(first["path"]) == {name: FILES[name] for name in ("config.json", "model.safetensors", "data/a.jsonl")}
    shown = [event["done"] / event["total"] for event in events if event["event"] == "advanced"]
    assert shown == sorted(shown) and shown[-1] == 1
    offline, events = ask("hf://org/name@main", tmp_path, "http://127.0.0.1:9")
    assert offline == first
    assert "going on with what it was last" in events[0]["text"]
    server.head = LATER
    moved, _ = ask("hf://org/name", tmp_path, server.url)
    assert moved["pinned"]["exact"] == f"hf://org/name@{LATER}"
    assert moved["pinned"]["digest"] == first["pinned"]["digest"], "the same bytes are the same content"


def test_commit_is_known_without_network_and_a_file_alone_is_a_file(server: Hub, tmp_path: Path) -> None:
    source = f"hf://datasets/org/name@{COMMIT}/data/a.jsonl"
    first, _ = ask(source, tmp_path, server.url)
    assert first["pinned"]["digest"] == digest_bytes(FILES["data/a.jsonl"])
    assert Path(first["path"]).name == "a.jsonl"
    server.requests.clear()
    again, _ = ask(source, tmp_path, server.url)
    assert again == first and server.requests == []
    folder, _ = ask(f"hf://datasets/org/name@{COMMIT}/data", tmp_path, server.url)
    assert tree(folder["path"]) == {"a.jsonl": FILES["data/a.jsonl"]}


def test_download_that_was_cut_goes_on_where_it_ended(server: Hub, tmp_path: Path) -> None:
    server.cut_after = 12_000_000
    failed, _ = ask(f"hf://org/name@{COMMIT}", tmp_path, server.url)
    assert failed["error"] == "Unavailable", failed
    server.cut_after, server.status = None, 200
    server.requests.clear()
    done, _ = ask(f"hf://org/name@{COMMIT}", tmp_path, server.url)
    assert tree(done["path"])["model.safetensors"] == FILES["model.safetensors"]
    resumed = [span for verb, path, span in server.requests if verb == "GET" and path.endswith("model.safetensors")]
    assert resumed and int(resumed[0].removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.parametrize(
    ("source", "kind", "text"),
    [
        ("hf://org/other", "StageError", "the hub has no"),
        ("hf://org/name@nothing", "StageError", "the hub has no"),
        (f"hf://datasets/org/name@{COMMIT}/absent", "StageError", "holds nothing of use"),
    ],
)
def test_what_the_hub_lacks_is_refused(server: Hub, tmp_path: Path, source: str, kind: str, text: str) -> None:
    answer, _ = ask(source, tmp_path, server.url)
    assert answer["error"] == kind and text in answer["text"]


@pytest.mark.parametrize(("status", "kind"), [(503, "Unavailable"), (403, "StageError")])
def test_hub_that_fails_or_refuses_is_told_apart(server: Hub, tmp_path: Path, status: int, kind: str) -> None:
    server.status = status
    answer, _ = ask("hf://org/name", tmp_path, server.url)
    assert answer["error"] == kind and str(status) in answer["text"]


def test_source_of_another_form_is_refused() -> None:
    with pytest.raises(StageError, match="names no repository"):
        hub.parse("hf://name")
    assert hub.parse("hf://org/name@refs%2Fpr%2F1/x") == hub.Repository("model", "org/name", "refs/pr/1", "x")
