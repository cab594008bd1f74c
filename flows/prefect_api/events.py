"""What others may subscribe to: Enginery's events on the Prefect server, sent so that they are known to stand there.

Prefect's own emitter hands an event to a thread that dies with the process. Here an event is posted, and then asked for
until the server has it on record; its id is fixed beforehand, so that sending it again is harmless.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flows.prefect_api.retry import answered, api, patiently
from stages.runtime.contract import Frozen

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

    Args:
        one: the event.
        confirm_s: how long the server may be away, and then how long it may take to have the event on record.

    Raises:
        Unavailable: the server does not answer.
        StageError: it refuses.
    """
    if patiently(lambda: stands(one.id), away_s=confirm_s):
        return True
    patiently(lambda: _send(one), away_s=confirm_s)
    deadline = time.monotonic() + confirm_s
    while not (found := patiently(lambda: stands(one.id), away_s=confirm_s)) and time.monotonic() < deadline:
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
    with answered(), api() as client:
        response = client.request("POST", path, json=body)
        return response.json() if response.content else None
