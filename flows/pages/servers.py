"""The two servers of a store's pages: started as processes of their own, awaited, and ended together.

Neither is reached from outside: both listen on the loopback interface alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import FrameType

import httpx

from flows.running.interruption import unwinding
from stages.runtime.contract import StageError, Unavailable
from stages.runtime.fingerprint import ROOT

HOST = "127.0.0.1"
GRACE_S = 3.0
"""After so long a server that was asked to end is killed."""
HEALTH = {"Prefect": "/api/health", "MLflow": "/health"}
"""The servers, and what answers once they are there."""
SERVES = "serves.json"
_START_S = 300.0
_LOOK_S = 0.2
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Say = Callable[[str], None]


@dataclass
class Server:
    """A server that was started here.

    Attributes:
        name: of what it serves.
        address: of its pages.
        log: what it writes.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def answers(self) -> bool:
        """Whether it serves.

        Raises:
            StageError: it has ended.
        """
        self.check()
        try:
            return httpx.get(self.address + HEALTH[self.name], timeout=1.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def check(self) -> None:
        """Raise where it has ended, with the end of its log."""
        status = self.process.poll()
        if status is None:
            return
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise StageError(
            f"{self.name}'s server ended with {status}: {said[-1] if said else 'it said nothing'}",
            remedy=f"See {self.log}, and start it again.",
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The pages that a person asks for.

    Attributes:
        store: its URI.
        scratch: its folder on this machine.
        ports: of "Prefect" and "MLflow"; 0 for one that is free.
        say: tells the person.
    """

    store: str
    scratch: Path
    ports: Mapping[str, int]
    say: Say

    @property
    def folder(self) -> Path:
        """Where the servers' logs and addresses lie."""
        return self.scratch / "pages"

    def tell(self, addresses: Mapping[str, str]) -> None:
        """Say where the pages are."""
        for name in HEALTH:
            self.say(f"{name}: {addresses[name]}")


def show_pages(wanted: Wanted) -> None:
    """Serve the pages of a store until a signal ends them. A server that the environment names is named, not started.

    Raises:
        StageError: a port is taken, or a server ended by itself.
        Unavailable: a server does not answer in time.
    """
    elsewhere = _named()
    if elsewhere.keys() == HEALTH.keys():
        wanted.tell(elsewhere)
        return
    wanted.folder.mkdir(parents=True, exist_ok=True)
    with (wanted.folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell_of_other(wanted)
            return
        with _ended_by_signals() as ended, ExitStack() as stack:
            stack.callback((wanted.folder / SERVES).unlink, missing_ok=True)
            _serve(wanted, elsewhere, ended, stack)


def _serve(wanted: Wanted, elsewhere: Mapping[str, str], ended: Event, stack: ExitStack) -> None:
    said = {"process": os.getpid(), "host": socket.gethostname()}
    _write(wanted.folder / SERVES, said)
    own = [name for name in HEALTH if name not in elsewhere]
    sockets = {name: stack.enter_context(_listening(name, wanted.ports[name])) for name in own}
    addresses = {name: f"http://{HOST}:{one.getsockname()[1]}" for name, one in sockets.items()} | dict(elsewhere)
    new = "Prefect" in own and not (wanted.scratch / "prefect" / "prefect.db").exists()
    wanted.say("starting" + ("; Prefect makes its database first, which takes up to a minute" if new else ""))
    servers: list[Server] = []
    stack.callback(_end, servers)
    for name, listening in sockets.items():
        servers.append(_started(name, addresses, listening, wanted))
        listening.close()
    if not _all_answer(servers, ended, wanted.folder):
        return
    pages = {name: address + ("" if name in elsewhere else "/runs") for name, address in addresses.items()}
    _write(wanted.folder / SERVES, {**said, "pages": pages})
    wanted.tell(pages)
    wanted.say("Ctrl-C ends them; no run needs them")
    while not ended.wait(1.0):
        for server in servers:
            server.check()


def _all_answer(servers: Sequence[Server], ended: Event, folder: Path) -> bool:
    """Whether they came up before someone ended them."""
    until = time.monotonic() + _START_S
    while not all(server.answers() for server in servers):
        if ended.wait(_LOOK_S):
            return False
        if time.monotonic() > until:
            raise Unavailable(
                "the pages did not come up in time", limit=f"{_START_S:g} s", remedy=f"See the logs in {folder}."
            )
    return True


def _started(name: str, addresses: Mapping[str, str], listening: socket.socket, wanted: Wanted) -> Server:
    folder, scratch, descriptor = wanted.folder, wanted.scratch, listening.fileno()
    if name == "MLflow":
        command = ["flows.pages.mlflow_server", str(descriptor), str(scratch), wanted.store]
        # Its jobs would start processes of their own; nothing of ours is one.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    else:
        command = ["flows.pages.prefect_server", str(descriptor), str(scratch), addresses["MLflow"]]
        environment = _prefect_environment(scratch / "prefect", addresses["Prefect"])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    log = folder / f"{name.lower()}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,  # its end is ours: a server whose parent was killed ends by it
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,  # no prefect.toml or .env of whoever asks
            env={**environment, "PYTHONPATH": path},
            pass_fds=(descriptor,),
            start_new_session=True,  # a terminal's Ctrl-C comes to us alone
        )
    return Server(name, addresses[name], process, log)


def _prefect_environment(home: Path, address: str) -> dict[str, str]:
    """Its database is the store's, whatever profile or server the person uses besides."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return others | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address,  # its default lets any page of the web ask it
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # by default it writes into its own package
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # that one asks a server of Amplitude for its settings
    }


def _named() -> dict[str, str]:
    """Addresses of the servers that the environment names."""
    prefect, mlflow = os.environ.get("PREFECT_API_URL", ""), os.environ.get("MLFLOW_TRACKING_URI", "")
    found = {}
    if prefect:
        found["Prefect"] = os.environ.get("PREFECT_UI_URL") or prefect.rstrip("/").removesuffix("/api")
    if mlflow.startswith(("http://", "https://")):
        found["MLflow"] = (os.environ.get("ENGINERY_MLFLOW_PAGES") or mlflow).rstrip("/")
    return found


def _tell_of_other(wanted: Wanted) -> None:
    """Another process serves this store's pages: where, once it knows."""
    try:
        other = json.loads((wanted.folder / SERVES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        other = {}
    who = f"process {other['process']} on {other['host']}" if other else "another process"
    if other.get("pages"):
        wanted.say(f"{who} serves the pages of this store already")
        wanted.tell(other["pages"])
    else:
        wanted.say(f"{who} is starting the pages of this store; ask again in a moment")


def _listening(name: str, port: int) -> socket.socket:
    """A socket on the loopback interface. The server gets it as it is, so that nobody can take the port meanwhile."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise StageError(
            f"{name}'s pages cannot be served on port {port} ({error.strerror})",
            remedy=f"Name another with --{name.lower()}-port, or leave it out for a free one.",
        ) from error
    listening.listen(128)
    return listening


def _end(servers: Sequence[Server]) -> None:
    """End the groups of all servers: by SIGTERM, and after a grace by SIGKILL."""
    until = time.monotonic() + GRACE_S
    for server in servers:
        _signal(server, signal.SIGTERM)
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(max(0.0, until - time.monotonic()))
        _signal(server, signal.SIGKILL)
        server.process.wait()
        if server.process.stdin:
            server.process.stdin.close()


def _signal(server: Server, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, number)


@contextmanager
def _ended_by_signals() -> Iterator[Event]:
    """An event that the signals set by which a person ends a command; what is ignored (nohup) stays so."""
    ended = Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        unwinding()  # nobody needs to be reminded of this signal
        ended.set()

    before = {number: signal.getsignal(number) for number in _ENDS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(path: Path, said: Mapping[str, object]) -> None:
    whole = path.with_name(f".{path.name}")
    whole.write_text(json.dumps(said), encoding="utf-8")
    whole.replace(path)
