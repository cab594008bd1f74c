"""What others may subscribe to: Enginery's events on the Prefect server, sent so that they are known to stand there.

Prefect's own emitter hands an event to a thread that dies with the process. Here an event is posted, and then asked for
until the server has it on record; its id is fixed beforehand, so that sending it again is harmless.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from stages.runtime.contract import Frozen, StageError, Unavailable

CHECKPOINT_CREATED = "enginery.checkpoint.created"
ALIAS_MOVED = "enginery.registry.alias_moved"
MODEL_PROMOTED = "enginery.model.promoted"
MODEL_ROLLED_BACK = "enginery.model.rolled_back"

CONFIRM_S = 30.0
"""How long the server may take to have an event on record; it writes them in batches every five seconds."""


class Announcement(Frozen):
    """An event that is sent once, however often it is sent.

    Attributes:
        resource: Prefect's labels; it needs `prefect.resource.id`.
    """

    id: UUID
    event: str
    resource: dict[str, str]
    payload: dict[str, Any]


def has_server() -> bool:
    """Whether there is a Prefect server that outlives this process."""
    return bool(os.environ.get("PREFECT_API_URL"))


def deliver(one: Announcement, *, confirm_s: float = CONFIRM_S) -> bool:
    """Send an event unless it stands on the server; whether it is known to stand there now.

    Raises:
        Unavailable: the server does not answer.
        StageError: it refuses.
    """
    if stands(one.id):
        return True
    _send(one)
    deadline = time.monotonic() + confirm_s
    while not (found := stands(one.id)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def stands(identity: UUID) -> bool:
    """Whether the server has an event on record.

    Raises:
        Unavailable: the server does not answer.
        StageError: it refuses.
    """
    # A sender whose clock is ahead dates its events into the server's future, which a search leaves out by default.
    until = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    asked = {"filter": {"id": {"id": [str(identity)]}, "occurred": {"until": until}}, "limit": 1}
    return bool(_post("/events/filter", asked)["events"])


def _send(one: Announcement) -> None:
    dated = {"occurred": datetime.now(UTC).isoformat(), "related": []}
    _post("/events", [one.model_dump(mode="json") | dated])


def _post(path: Any, body: Any) -> Any:
    from prefect.client.orchestration import get_client

    with answered(), get_client(sync_client=True) as client:
        response = client.request("POST", path, json=body)
        return response.json() if response.content else None


@contextmanager
def answered() -> Iterator[None]:
    """The Prefect server's errors as ours: Unavailable where another try may help."""
    from httpx import HTTPStatusError, TransportError

    where = os.environ.get("PREFECT_API_URL", "")
    try:
        yield
    except TransportError as error:
        raise Unavailable(
            f"no Prefect server answers at {where}",
            measured=type(error).__name__,
            remedy="Start it, or unset PREFECT_API_URL to work without one.",
        ) from error
    except HTTPStatusError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise Unavailable(f"the Prefect server at {where} failed", measured=f"HTTP {status}") from error
        raise StageError(
            f"the Prefect server at {where} refused",
            measured=f"HTTP {status} {error.response.text[:200]}",
            remedy="Check PREFECT_API_URL and PREFECT_API_AUTH_STRING.",
        ) from error
