"""The doctor: each line ok or missing with a remedy; the exit code speaks of what is needed."""

import http.server
import subprocess
import threading

import pytest

from flows.cli import main
from flows.commands import doctor
from flows.settings import settle
from stages.runtime.contract import StageError


@pytest.fixture
def lines(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    def look(store: str = "") -> dict[str, doctor.Line]:
        return {line.name: line for line in doctor.diagnose(settle(store=store or str(tmp_path / "store")))}

    return look


@pytest.fixture
def answering():
    """A server on the loopback that says yes to everything."""

    class Yes(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Yes)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_doctor_on_this_machine_finds_what_is_needed_and_has_a_remedy_for_the_rest(lines):
    found = lines()
    assert all(line.ok for line in found.values() if line.needed), found
    assert {
        "store",
        "disk",
        "versions",
        "GPU",
        "tensorrt_rtx",
        "tensorrt",
        "Docker",
        "MLflow tracking",
        "Prefect",
    } <= set(found)
    assert all(line.remedy for line in found.values() if not line.ok)
    assert "embedded" in found["Prefect"].text


def test_doctor_sees_a_wrong_version_an_absent_library_and_a_store_it_may_not_use(lines, monkeypatch, tmp_path):
    pinned = dict(doctor.constraints()) | {"numpy": "0.1", "mlflow": "9"}
    monkeypatch.setattr(doctor, "constraints", lambda: pinned)
    monkeypatch.setattr(
        doctor, "_version", lambda name: "absent" if name in ("mlflow", "onnxruntime") else pinned.get(name, "1")
    )
    (tmp_path / "file").write_text("")
    found = lines(str(tmp_path / "file"))
    assert "mlflow absent instead of 9" in found["versions"].text and not found["versions"].ok
    assert not found["store"].ok and "--store" in found["store"].remedy
    assert not found["onnxruntime"].ok and "disk" not in found


def test_doctor_reads_what_tools_say(lines, monkeypatch):
    said = {"nvidia-smi": "NVIDIA L4, 8.9, 23034 MiB\n", "docker": ""}

    def run(command, **_):
        name = command[0].rpartition("/")[2]
        if name.startswith("python"):
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, 0 if said[name] else 1, said[name], "")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = lines()
    assert found["GPU"].ok and found["GPU"].text == "NVIDIA L4, 8.9, 23034 MiB"
    assert not found["Docker"].ok and not found["tensorrt_rtx"].ok
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert lines()["Docker"].text == "no docker command"


def test_doctor_asks_servers_that_the_environment_names(lines, monkeypatch, answering):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answering)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    found = lines()
    assert found["MLflow tracking"].ok and "answers 200" in found["MLflow tracking"].text
    assert not found["Prefect"].ok and "PREFECT_API_URL" in found["Prefect"].remedy
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/x.db")
    assert "embedded" in lines()["MLflow tracking"].text


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
def test_doctor_exit_code_is_1_only_when_something_needed_is_missing(monkeypatch, capsys, needed, code):
    line = doctor.Line("thing", False, "not there", "Install it.", needed=needed)
    monkeypatch.setattr(doctor, "diagnose", lambda settings: iter([doctor.Line("a", True, "fine"), line]))
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines() == [
        "ok      a: fine",
        "missing thing: not there",
        "        Install it.",
    ]


def test_doctor_reports_an_alias_that_was_moved_by_hand(lines, monkeypatch):
    from flows.registry import journal, projection
    from flows.tracking import connect

    assert "aliases" not in lines()
    monkeypatch.setattr(journal, "models", lambda objects: ["m"])
    monkeypatch.setattr(connect, "open_tracking", lambda scratch: None)
    monkeypatch.setattr(projection, "drift", lambda found, model: [projection.Drift(model, "champion", "2", None)])
    found = lines()["aliases"]
    assert not found.ok and "m@champion is on nothing, the journal says 2" in found.text
    assert "reconcile" in found.remedy
    monkeypatch.setattr(projection, "drift", lambda found, model: [])
    assert lines()["aliases"].ok

    def broken(scratch):
        raise StageError("MLflow is gone")

    monkeypatch.setattr(connect, "open_tracking", broken)
    assert "MLflow is gone" in lines()["aliases"].text
