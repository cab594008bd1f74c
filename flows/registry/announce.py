"""Promotions and rollbacks as events: each entry of the journal is told once, later where the server was away."""

from __future__ import annotations

import logging
from uuid import UUID, uuid5

from flows.names import alias_fault
from flows.prefect_api.events import MODEL_PROMOTED, MODEL_ROLLED_BACK, Announcement, deliver, has_server
from flows.registry.journal import JOURNAL, Promotion, history
from stages.runtime.contract import StageError
from stages.runtime.stores import Objects

NAMESPACE = UUID("6f1d7f0e-8c3b-5b55-9a3e-2f6a3b0f4c11")

_LOG = logging.getLogger(__name__)


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
            "version": None if entry.action == "withdraw" else entry.version.number,
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
    newest = {entry.alias: entry for entry in history(objects, model) if not alias_fault(entry.alias)}
    for alias, entry in sorted(newest.items()):
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
