"""What arrived and what came of it: records in the store, put if absent, so that nothing happens twice.

`arrivals/<recipe>/<key>.json` says that something arrived, `<key>.run.json` which flow run took it, `<key>.done.json`
that nothing is left to do. The key of a checkpoint is the digest of its content: the same bytes at two places are one
arrival. A record that is taken away (`forget`) makes its arrival new.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from flows.prefect_api.events import ALIAS_MOVED, CHECKPOINT_CREATED, Announcement
from flows.recipe.model import Recipe
from stages.runtime.contract import Frozen, StageError
from stages.runtime.fingerprint import canonical, digest_bytes
from stages.runtime.stores import Objects

ARRIVALS = "arrivals/"


class Arrival(Frozen):
    """Something that a recipe is to be run for.

    Attributes:
        recipe: its name.
        key: identity within the recipe, 64 hex digits.
        uri: source for the recipe's fetch step; empty for the one that stands in the recipe.
        digest: of the source's content, empty where it is not known.
        name: what a person calls it.
        id: of its event. It is drawn anew for each record, so that a record taken away on purpose is a new event.
    """

    recipe: str
    key: str
    uri: str
    digest: str
    name: str
    event: str
    id: UUID
    payload: dict[str, Any]
    seen: str

    def announcement(self) -> Announcement:
        """Its event. The payload's `checkpoint` is what the run takes as its parameter."""
        kind = "checkpoint" if self.event == CHECKPOINT_CREATED else "registry"
        resource = {
            "prefect.resource.id": f"enginery.{kind}.{self.key}",
            "prefect.resource.name": self.name,
            "enginery.recipe": self.recipe,
        }
        payload = {**self.payload, "recipe": self.recipe, "uri": self.uri, "checkpoint": f"{self.uri}#{self.key}"}
        return Announcement(id=self.id, event=self.event, resource=resource, payload=payload)


def checkpoint(recipe: str, uri: str, digest: str, sizes: Mapping[str, int]) -> Arrival:
    """A whole checkpoint at a source."""
    facts = {"digest": digest, "files": sorted(sizes), "bytes": sum(sizes.values())}
    return _arrival(recipe, digest, uri, digest, uri, CHECKPOINT_CREATED, facts)


def moved_alias(recipe: str, model: str, alias: str, version: str, uri: str, origin: str) -> Arrival:
    """An alias of the registry on a version; `origin` tells apart versions of one number in a rebuilt registry."""
    key = digest_bytes(canonical([model, alias, version, origin]))
    facts = {"model": model, "alias": alias, "version": version}
    return _arrival(recipe, key, uri, "", f"{model}@{alias}", ALIAS_MOVED, facts)


def arrived(objects: Objects, arrival: Arrival) -> Arrival:
    """The record of an arrival: this one, or the one that stood already."""
    if objects.put(_key(arrival.recipe, arrival.key), arrival.model_dump_json(indent=1).encode()):
        return arrival
    return find(objects, arrival.recipe, arrival.key) or arrival


def find(objects: Objects, recipe: str, key: str) -> Arrival | None:
    """A recorded arrival."""
    data = objects.read(_key(recipe, key))
    return Arrival.model_validate_json(data) if data else None


def finish(objects: Objects, arrival: Arrival, **facts: Any) -> None:
    """Nothing is left to do for an arrival: its event stands, or its run ended as `facts` say."""
    objects.put(_key(arrival.recipe, arrival.key, ".done"), canonical({"when": _now(), **facts}))


def finished(objects: Objects, recipe: str) -> set[str]:
    """The keys of arrivals for which nothing is left to do."""
    found = (one.key.rpartition("/")[2] for one in objects.list(f"{ARRIVALS}{recipe}/"))
    return {name.removesuffix(".done.json") for name in found if re.fullmatch(r"[0-9a-f]{64}\.done\.json", name)}


def pending(objects: Objects, recipe: str, event: str) -> list[Arrival]:
    """The recorded arrivals of a kind for which something is left to do, the oldest first."""
    done, found = finished(objects, recipe), []
    for one in list(objects.list(f"{ARRIVALS}{recipe}/")):
        key = re.fullmatch(r"([0-9a-f]{64})\.json", one.key.rpartition("/")[2])
        record = find(objects, recipe, key[1]) if key and key[1] not in done else None
        if record and record.event == event:
            found.append(record)
    return sorted(found, key=lambda one: one.seen)


def forget(objects: Objects, recipe: str, prefix: str) -> str:
    """Take away the one arrival whose key begins so; returns the key.

    Raises:
        StageError: none or several begin so.
    """
    found = [one.key for one in objects.list(f"{ARRIVALS}{recipe}/")]
    keys = {m[1] for key in found if (m := re.search(rf"/({re.escape(prefix)}[0-9a-f]*)\.(?:\w+\.)?json$", key))}
    keys = {key for key in keys if len(key) == 64}
    if len(keys) != 1:
        raise StageError(
            f"{'no arrival' if not keys else 'more than one arrival'} for {recipe} begins with {prefix!r}",
            measured=len(keys),
            limit=1,
            remedy=f"{objects.uri}/{ARRIVALS}{recipe}/ holds them.",
        )
    (key,) = keys
    # The record last: a kill in between leaves an arrival that is known and not done, never one that is half forgotten.
    for suffix in (".done", ".run", ""):
        objects.delete(_key(recipe, key, suffix))
    return key


def begin(objects: Objects, recipe: Recipe, checkpoint: str, flow_run: str) -> tuple[Recipe, str]:
    """Take an arrival for a flow run, unless another has it.

    Args:
        objects: the store's.
        recipe: to run.
        checkpoint: a source; with `#KEY` after it, that of an arrival, which one flow run alone may take.
        flow_run: id of the one that asks. It keeps what it took when it is started again.

    Returns:
        The recipe on that source, and the id of the flow run that took the arrival, empty for this one.

    Raises:
        StageError: the recipe has not exactly one step that fetches.
    """
    source, key = _split(checkpoint)
    record = find(objects, recipe.name, key) if key else None
    ready = on_source(recipe, source, record.digest if record else "")
    if not key:
        return ready, ""
    mine = canonical({"flow_run": flow_run, "when": _now()})
    name = _key(recipe.name, key, ".run")
    if objects.put(name, mine):
        return ready, ""
    holder = str(json.loads(objects.read(name) or mine)["flow_run"])
    return ready, "" if holder == flow_run else holder


def on_source(recipe: Recipe, source: str, digest: str = "") -> Recipe:
    """The recipe with another checkpoint in its one fetch step; an empty source leaves it as it is.

    Raises:
        StageError: it has no such step, or several.
    """
    if not source:
        return recipe
    names = [step.name for step in recipe.steps if step.stage == "fetch"]
    if len(names) != 1:
        raise StageError(
            f"recipe {recipe.name} cannot take a checkpoint that arrives",
            measured=f"{len(names)} fetch steps: {', '.join(names)}" if names else "no fetch step",
            limit="1 fetch step",
            remedy="Use a recipe that fetches one checkpoint.",
        )
    step = recipe.step(names[0])
    others = {name: value for name, value in step.params.items() if name not in ("source", "digest")}
    given = {"source": source, **({"digest": digest} if digest else {})}
    fetch = step.model_copy(update={"params": others | given})
    return recipe.model_copy(update={"steps": [fetch if one is step else one for one in recipe.steps]})


def _arrival(recipe: str, key: str, uri: str, digest: str, name: str, event: str, facts: dict[str, Any]) -> Arrival:
    return Arrival(
        recipe=recipe, key=key, uri=uri, digest=digest, name=name, event=event, id=uuid4(), payload=facts, seen=_now()
    )


def _key(recipe: str, key: str, suffix: str = "") -> str:
    return f"{ARRIVALS}{recipe}/{key}{suffix}.json"


def _split(checkpoint: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*)#([0-9a-f]{64})", checkpoint, re.DOTALL)
    return (found[1], found[2]) if found else (checkpoint, "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
