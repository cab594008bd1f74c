"""Temporary Prefect servers whose run was killed: nothing ends them, so the next run beside the store does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil


def end_orphaned_servers(home: str) -> int:
    """End every temporary server that keeps its files in `home` and has lost its parent; returns how many.

    A server that a person started is left alone: it does not call itself ephemeral.
    """
    ended = list(_orphans(home))
    for process in ended:
        process.terminate()
    return len(ended)


def _orphans(home: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if not any("prefect.server" in word for word in process.cmdline()):
                continue
            parent, said = process.parent(), process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        # In a container process 1 may be a run itself, and may be this one.
        lost = parent is None or (parent.pid == 1 and parent.pid != os.getpid())
        if lost and said.get("PREFECT__SERVER_EPHEMERAL") == "1" and said.get("PREFECT_HOME") == home:
            yield process
