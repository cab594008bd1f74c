"""A server of pages as a process of its own: it serves a socket that it was given, and ends with who gave it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import BaseRoute, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.pages.servers import GRACE_S

_AT_HOME = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""No page asks anyone but its own server, whatever its scripts would like to tell elsewhere."""


def end_with_parent() -> None:
    """End when standard input does: it is a pipe of the process that started this one. Call before anything is slow."""

    def wait() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def below(app: Any, routes: Sequence[BaseRoute]) -> Starlette:
    """An application with routes of ours before its own."""

    @asynccontextmanager
    async def lifespan(_outer: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    return Starlette(routes=[*routes, Mount("/", app)], lifespan=lifespan)


def serve(app: ASGIApp, descriptor: int, beside: Coroutine[Any, Any, None] | None = None) -> None:
    """Serve until a signal.

    Args:
        app: an ASGI application.
        descriptor: a socket that listens already.
        beside: what goes on once it serves.
    """
    # A page elsewhere must not reach it by a name that it has resolved to this machine.
    guarded = TrustedHostMiddleware(_at_home(app), allowed_hosts=["127.0.0.1", "localhost"])
    config = uvicorn.Config(guarded, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    asyncio.run(_served(server, socket.socket(fileno=descriptor), beside))


async def _served(server: uvicorn.Server, listening: socket.socket, beside: Coroutine[Any, Any, None] | None) -> None:
    async def once_it_serves(what: Coroutine[Any, Any, None]) -> None:
        while not server.started:
            await asyncio.sleep(0.1)
        await what

    task = asyncio.create_task(once_it_serves(beside)) if beside else None
    await server.serve(sockets=[listening])
    if task:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _at_home(app: ASGIApp) -> ASGIApp:
    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _AT_HOME
            await send(message)

        await app(scope, receive, sent)

    return guarded
