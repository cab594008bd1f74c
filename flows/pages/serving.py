"""A server of pages as a process of its own: it serves a socket that it was given, and ends with who gave it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import uvicorn

from flows.pages.servers import GRACE_S


def serve(app: Any, descriptor: int, beside: Coroutine[Any, Any, None] | None = None) -> None:
    """Serve until a signal, or until standard input ends: it is the pipe of the process that started this one.

    Args:
        app: an ASGI application.
        descriptor: a socket that listens already.
        beside: what goes on once it serves.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
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


def _end_with_parent(server: uvicorn.Server) -> None:
    while sys.stdin.buffer.read(1):
        pass
    server.should_exit = True
    time.sleep(GRACE_S)
    os._exit(1)
