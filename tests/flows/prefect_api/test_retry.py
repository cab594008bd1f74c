"""Prefect's API that is dead, hangs, comes back or refuses: what asking again costs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.prefect_api.retry import api, patiently
from stages.runtime.contract import StageError, Unavailable

CONNECT_S = 2
"""httpcore tries a refused connection three times within 1.5 s, whoever asks."""


@pytest.fixture
def at(monkeypatch):
    """Name an address as Prefect's API."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with contextlib.ExitStack() as entered:

        def name(port):
            url = f"http://127.0.0.1:{port}/api"
            monkeypatch.setenv("PREFECT_API_URL", url)
            entered.enter_context(temporary_settings({PREFECT_API_URL: url}))

        yield name


@pytest.fixture
def dead():
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@pytest.fixture
def hanging():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as door:
        yield door.getsockname()[1]


def served(statuses):
    """A server that answers with one status after the other, and goes on with the last."""

    class Api(BaseHTTPRequestHandler):
        def do_GET(self):
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            body = json.dumps("3.8.8").encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def version():
    with api() as client:
        return client.api_version()


@pytest.mark.parametrize("server", ["dead", "hanging"])
def test_api_that_is_away_costs_at_most_the_deadline_however_deep_it_is_asked(at, server, request):
    at(request.getfixturevalue(server))
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"no Prefect server answers at http://127\.0\.0\.1"):
        patiently(lambda: patiently(lambda: patiently(version, away_s=2), away_s=2), away_s=2)
    assert time.monotonic() - began < 2 + CONNECT_S


def test_api_that_hangs_costs_prefects_own_functions_at_most_the_deadline_too(at, hanging):
    from prefect.deployments import run_deployment

    at(hanging)

    def ask():
        with api():
            run_deployment("run-stage/cpu", timeout=0)

    began = time.monotonic()
    with pytest.raises(Unavailable):
        patiently(ask, away_s=1)
    assert time.monotonic() - began < 1.6


@pytest.mark.parametrize("server", ["dead", "hanging"])
def test_api_that_is_away_is_left_at_once_by_an_interrupt(at, server, request):
    at(request.getfixturevalue(server))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        patiently(version, away_s=60)
    assert time.monotonic() - began < 1.2


def test_api_that_comes_back_is_used(at, monkeypatch):
    monkeypatch.setattr("stages.runtime.patience.LONGEST_PAUSE_S", 0.2)
    server = served([500, 500, 500, 200])
    at(server.server_address[1])
    assert patiently(version, away_s=30) == "3.8.8"
    server.shutdown()
    server.server_close()


def test_api_that_refuses_is_not_asked_again(at):
    server = served([403, 200])
    at(server.server_address[1])
    began = time.monotonic()
    with pytest.raises(StageError, match="refused") as told:
        patiently(version, away_s=30)
    assert not isinstance(told.value, Unavailable)
    assert time.monotonic() - began < 1
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("server", ["dead", "hanging"])
def test_bar_of_a_stage_waits_two_seconds_for_a_server_that_is_away_and_then_leaves_it_alone(at, server, request):
    from prefect import flow
    from prefect.context import FlowRunContext

    from flows.prefect_api import progress

    at(request.getfixturevalue(server))
    bar = progress.Bar("step")
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "_ANSWER_S", 0.3)
        with FlowRunContext.model_construct(flow=flow(lambda: None, name="any"), flow_run=None):
            for done in range(50):
                bar.advanced(done, 50)
                bar.advanced(50, 50)
    assert time.monotonic() - began < 1 + CONNECT_S
