"""Serves one model until it is told to stop, and then lets run what runs for a moment."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.endpoint.application import Endpoint, application
from flows.endpoint.metrics import Metrics
from flows.endpoint.refusals import Refusal
from flows.endpoint.vectors import Vectors
from flows.running.interruption import unwinding
from stages.runtime.contract import StageError
from stages.serving.batching import Batching
from stages.serving.engine import WRITES, Answerer

ENDS_S = 2.5
"""What is being written when the server is told to stop may go on for so long; a command may take 4.5 s to end."""
TASKS = (*WRITES, "embed")
_CLOSES_S = 3
_LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and where.

    Attributes:
        model: it continues texts, answers them by a decoder of its own, or gives vectors of them.
        name: as clients call it.
        host: where it listens.
        port: 0 for one that is free.
        rows: answers that are written at once at most.
        queue: prompts that wait at most.
    """

    model: Answerer
    name: str
    host: str
    port: int
    rows: int
    queue: int


def serve(served: Served, say: Callable[[str], None]) -> None:
    """Serve until a signal.

    Raises:
        StageError: the model does neither, or the port cannot be listened on.
    """
    if served.model.task not in TASKS:
        raise StageError(
            f"{served.name} writes no texts and gives no vectors of them",
            measured=f"its task is {served.model.task}",
            limit=" or ".join(TASKS),
            remedy="Serve a model that does.",
        )
    listening = _listening(served.host, served.port)
    metrics = Metrics()
    batching = Batching(served.model, rows=served.rows, waiting=served.queue, watch=metrics)
    vectors = _vectors(served)
    metrics.follow(vectors or batching)
    app: ASGIApp = application(Endpoint(served.name, batching, metrics, vectors))
    if _at_home(served.host):
        app = _called_by_its_own_name(app)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each piece for a client that has just gone
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_CLOSES_S
    )
    host = f"[{served.host}]" if ":" in served.host else served.host
    line = f"{served.name} on http://{host}:{listening.getsockname()[1]}/v1, executed by {served.model.target}"
    asyncio.run(_served(uvicorn.Server(config), listening, batching, lambda: say(line)))
    batching.join(_LOOK_S)


def _vectors(served: Served) -> Vectors | None:
    return Vectors(served.model, served.queue) if served.model.task == "embed" else None


async def _served(
    server: uvicorn.Server, listening: socket.socket, batching: Batching, ready: Callable[[], None]
) -> None:
    async def beside() -> None:
        while not server.started:
            await asyncio.sleep(_LOOK_S)
        ready()
        while not server.should_exit:
            await asyncio.sleep(_LOOK_S)
        unwinding()  # uvicorn raises the signals again that it took
        batching.close(ENDS_S)

    task = asyncio.create_task(beside())
    try:
        await server.serve(sockets=[listening])
    finally:
        batching.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _listening(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()  # so that another server hears now that the port is taken
    except OSError as error:
        listening.close()
        raise StageError(
            f"port {port} of {host} cannot be listened on ({error.strerror})",
            remedy="Name another with --port or --host.",
        ) from error
    return listening


def _called_by_its_own_name(app: ASGIApp) -> ASGIApp:
    """A page elsewhere must not reach a server of this machine by a name that it has resolved to it."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _at_home(Request(scope).url.hostname or ""):
            refusal = Refusal("the server is not asked by a name of this machine; limit localhost, 127.0.0.1, ::1")
            await refusal.response()(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded


def _at_home(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
