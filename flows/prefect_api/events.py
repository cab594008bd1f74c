"""What others may subscribe to: Enginery's events on the Prefect server, sent so that they are known to stand there.

Prefect's own emitter hands an event to a thread that dies with the process. Here an event is posted, and then asked for
until the server has it on record; its id is fixed beforehand, so that sending it again is harmless.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

from flows.registry.journal import JOURNAL, Promotion, head, history
from stages.runtime.contract import Frozen, StageError, Unavailable
from stages.runtime.stores import Objects

CHECKPOINT_CREATED = "enginery.checkpoint.created"
ALIAS_MOVED = "enginery.registry.alias_moved"
MODEL_PROMOTED = "enginery.model.promoted"
MODEL_ROLLED_BACK = "enginery.model.rolled_back"

NAMESPACE = UUID("6f1d7f0e-8c3b-5b55-9a3e-2f6a3b0f4c11")
CONFIRM_S = 30.0
"""How long the server may take to have an event on record; it writes them in batches every five seconds."""

_LOG = logging.getLogger(__name__)


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


def promotion(model: str, entry: Promotion) -> Announcement:
    """The event of an entry of the promotion journal; the same entry gives the same id."""
    candidate = entry.candidate
    served = candidate.executables.get(candidate.serves)
    return Announcement(
        id=uuid5(NAMESPACE, f"{model} {entry.model_dump_json()}"),
        event=MODEL_PROMOTED if entry.action == "promote" else MODEL_ROLLED_BACK,
        resource={
            "prefect.resource.id": f"enginery.model.{model}",
            "prefect.resource.name": f"{model}@{entry.alias}",
            "enginery.model": model,
            "enginery.alias": entry.alias,
        },
        payload={
            "model": model,
            "alias": entry.alias,
            "version": entry.version.number,
            "previous": entry.previous,
            "fingerprint": served.fingerprint if served else "",
            "targets": candidate.targets,
            "run": candidate.run,
            "who": entry.who,
            "why": entry.why,
        },
    )


def tell(objects: Objects, model: str) -> None:
    """Send the event of the entry that each alias of a model stands on, where no one was told of it yet.

    A server that does not answer undoes nothing: it is logged, and `enginery reconcile` sends the event.
    """
    if not has_server():
        return
    for alias in sorted({entry.alias for entry in history(objects, model)}):
        entry = head(objects, model, alias)
        assert entry is not None
        told = f"{JOURNAL}{model}/{entry.number:08d}.told.json"
        if objects.stat(told):
            continue
        one = promotion(model, entry)
        try:
            known = deliver(one)
        except StageError as error:
            _LOG.warning("%s@%s: nobody was told (%s); `enginery reconcile %s` will", model, alias, error, model)
            continue
        if known:
            objects.put(told, one.model_dump_json(indent=1).encode())
        else:
            _LOG.warning("%s@%s: the event was sent and is not on record yet; `enginery reconcile` asks", model, alias)


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
