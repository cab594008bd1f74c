"""`enginery ui`: both servers on the loopback interface, told where they are, and nothing left of them."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from flows.pages.servers import Wanted, show_pages
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import ROOT
from tests.flows.in_terminal import listening_to_signals
from tests.flows.prefect_server import eventually

ENDS_S = 5.0
SERVERS = ("flows.pages.prefect_server", "flows.pages.mlflow_server")


class Ui:
    """The command in a terminal of its own."""

    def __init__(self, store: Path, *options: str) -> None:
        self.store = store
        self._terminal, inside = pty.openpty()
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows", "ui", "--store", str(store), *options],
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True, cwd=store.parent,
            env={**plain, "PYTHONPATH": str(ROOT), "HOME": str(store.parent), "PREFECT_SERVER_API_HOST": "0.0.0.0"},
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(inside)
        self.said = ""

    def until(self, words: str, seconds: float = 240) -> str:
        deadline = time.monotonic() + seconds
        while words not in self.said and time.monotonic() < deadline:
            try:
                self.said += os.read(self._terminal, 4096).decode().replace("\r", "")
            except OSError:  # the other end is closed
                break
        assert words in self.said, self.said
        return self.said

    def servers(self) -> list[psutil.Process]:
        """Its servers that run, by the store in their command line: also those that lost their parent."""
        found = []
        for one in psutil.process_iter():
            try:
                words = one.cmdline()
            except psutil.Error:
                continue
            if any(name in words for name in SERVERS) and str(self.store / "state") in words:
                found.append(one)
        return found

    def pages(self) -> dict[str, str]:
        return dict(re.findall(r"^(Prefect|MLflow): (http\S+)/runs$", self.until("Ctrl-C ends them"), re.M))

    def ended(self) -> int:
        """Its exit code; nothing of it is left in time."""
        code = self.process.wait(ENDS_S)
        assert eventually(lambda: not self.servers(), ENDS_S), self.servers()
        self.hang_up()
        return code

    def hang_up(self) -> None:
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)


def _own_terminal() -> None:
    import fcntl
    import termios

    listening_to_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("pages") / "store"


@pytest.fixture(scope="module")
def ui(store):
    made = Ui(store)
    yield made
    if made.process.poll() is None:
        made.process.kill()


def test_ui_of_servers_that_are_named_starts_none_and_prints_their_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example/")
    said: list[str] = []
    show_pages(Wanted(store="file:///s", scratch=tmp_path, ports={"Prefect": 0, "MLflow": 0}, say=said.append))
    assert said == ["Prefect: http://prefect.example:4200", "MLflow: https://mlflow.example"]
    assert not list(tmp_path.iterdir())


def test_ui_on_a_port_that_is_taken_says_so_and_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = {"Prefect": other.getsockname()[1], "MLflow": 0}
        with pytest.raises(StageError, match=f"port {ports['Prefect']}.*--prefect-port"):
            show_pages(Wanted(store="file:///s", scratch=tmp_path, ports=ports, say=lambda _: None))
    assert not list((tmp_path / "pages").glob("*.log"))


@pytest.mark.fault
def test_ui_serves_both_on_the_loopback_interface_and_a_second_one_names_them(ui, store):
    assert "makes its database first" in ui.until("starting")
    pages = ui.pages()
    assert httpx.get(f"{pages['Prefect']}/api/health").json() is True
    assert httpx.get(f"{pages['MLflow']}/health").text == "OK"
    own = {one.laddr for server in ui.servers() for one in server.net_connections() if one.status == "LISTEN"}
    assert {f"http://{ip}:{port}" for ip, port in own} == set(pages.values())
    elsewhere = httpx.get(f"{pages['Prefect']}/api/health", headers={"host": "rebound.example"})
    assert elsewhere.status_code == 400
    assert "default-src 'self'" in httpx.get(f"{pages['Prefect']}/runs").headers["content-security-policy"]
    assert httpx.get(f"{pages['MLflow']}/runs").headers["location"].startswith("/#/experiments/")
    other = Ui(store)
    said = other.until("MLflow: ")
    assert f"process {ui.process.pid} on " in said
    assert all(page in said for page in pages.values())
    assert other.process.wait(ENDS_S) == 0
    other.hang_up()
    assert len(ui.servers()) == 2


@pytest.mark.fault
def test_ui_ends_by_ctrl_c_with_0_and_leaves_nothing(ui, store):
    ui.pages()
    ui.press(b"\x03")
    assert ui.ended() == 0
    assert not (store / "state" / "pages" / "serves.json").exists()
    assert "Traceback" not in ui.said


@pytest.mark.fault
@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "closed terminal", "Ctrl-C", "SIGKILL"])
def test_ui_that_is_ended_while_it_starts_leaves_nothing(store, how):
    starting = Ui(store)
    starting.until("starting")
    assert eventually(lambda: len(starting.servers()) == 2)
    if how == "closed terminal":
        starting.hang_up()
    elif how == "Ctrl-C":
        starting.press(b"\x03")
    else:
        starting.process.send_signal(getattr(signal, how))
    assert starting.ended() == (-9 if how == "SIGKILL" else 0)


@pytest.mark.fault
def test_ui_whose_server_is_killed_says_which_and_ends_the_other(store):
    serving = Ui(store)
    serving.pages()
    next(one for one in serving.servers() if SERVERS[1] in one.cmdline()).kill()
    assert "MLflow's server ended with -9" in serving.until("mlflow.log")
    assert serving.ended() == 1
