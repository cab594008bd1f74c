"""Work pools: their job templates are declared; whether they are paused and how much they do at once is the operator's.

A pool's limit is set when the pool is made, to what its machine bears, and later only where it is asked for by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from flows.production.differences import Difference, Part, compared
from flows.production.variables import SECRETS, Shell
from stages.runtime.contract import StageError
from stages.runtime.fingerprint import ROOT

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool

POOLS = ("flows", "cpu", "gpu")
Kind = Literal["docker", "kubernetes"]
FLOWS_AT_ONCE = 8
"""Runs of recipes only wait for their steps, each in a container of its own."""
_OPERATORS = ("scratch", "node_selector")
"""Variables of a template whose defaults are set on the pool itself: where a cluster's claims and nodes are."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the pools do at once; None for what was not said.

    Attributes:
        gpus: GPUs of the gpu pool; with 0 its containers ask for none.
        steps: containers of the cpu pool.
        set_gpus: set the gpu pool's limit and the global one to this, whatever stands.
        set_steps: set the cpu pool's limit to this, whatever stands.
    """

    gpus: int | None = None
    steps: int | None = None
    set_gpus: int | None = None
    set_steps: int | None = None

    @classmethod
    def told(cls, given: Mapping[str, str], gpus: int | None, steps: int | None) -> Size:
        """What the command's options say, and where they say nothing the shell's variables.

        Raises:
            StageError: a variable is no count.
        """
        return cls(
            gpus=_count(given, "ENGINERY_GPUS", 0) if gpus is None else gpus,
            steps=_count(given, "ENGINERY_CPU_STEPS", 1) if steps is None else steps,
            set_gpus=gpus,
            set_steps=steps,
        )

    def at_first(self, pool: str) -> int:
        """The limit of a pool that is made."""
        return {"flows": FLOWS_AT_ONCE, "cpu": self.steps or 1, "gpu": max(1, self.gpus or 1)}[pool]

    def asked(self, pool: str) -> int | None:
        """The limit that was asked for by name."""
        asked = {"cpu": self.set_steps, "gpu": self.set_gpus}.get(pool)
        return None if asked is None else max(1, asked)


def _count(given: Mapping[str, str], name: str, least: int) -> int | None:
    text = given.get(name, "")
    if text and not (text.isdecimal() and int(text) >= least):
        raise StageError(f"${name} is a count", measured=text, limit=f"{least} or more")
    return int(text) if text else None


def declared(pool: str, kind: Kind, gpus: int) -> dict[str, Any]:
    """The base job template of a pool as infra/ has it, with its names unfilled."""
    path = ROOT / "infra" / "pools" / f"{kind}-{pool}.json"
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if pool != "gpu" or gpus:
        return read
    if kind == "kubernetes":
        return declared("cpu", kind, 0)
    read["variables"]["properties"]["device_requests"]["default"] = []
    return read


def asks_for_gpu(template: Mapping[str, Any]) -> bool:
    """Whether the containers of a template get a GPU."""
    requests = template.get("variables", {}).get("properties", {}).get("device_requests", {}).get("default")
    return bool(requests) or "nvidia.com/gpu" in json.dumps(template.get("job_configuration", {}))


def merged(wanted: Mapping[str, Any], stands: Mapping[str, Any]) -> dict[str, Any]:
    """A template as declared, with what an operator added to its variables and to the environment."""
    made = deepcopy(dict(wanted))
    ours, theirs = made["variables"]["properties"], stands.get("variables", {}).get("properties", {})
    ours |= {name: value for name, value in theirs.items() if name not in ours}
    for name in _OPERATORS:
        if name in ours and "default" in theirs.get(name, {}):
            ours[name]["default"] = theirs[name]["default"]
    if "default" in ours.get("env", {}):
        ours["env"]["default"] = {**theirs.get("env", {}).get("default", {}), **ours["env"]["default"]}
    return made


def pool_differences(
    template: Mapping[str, Any], stands: WorkPool | None, *, kind: Kind, at_first: int, asked: int | None
) -> list[Difference]:
    """What of a pool is not as declared."""
    if stands is None:
        return [Difference(wanted=f"{kind}, {asked or at_first} at once")]
    found = [_without_secret(one) for one in compared(stands.base_job_template, template, "template")]
    if asked is not None and asked != stands.concurrency_limit:
        found.append(Difference(what="at once", now=str(stands.concurrency_limit or "no limit"), wanted=str(asked)))
    return found


def _without_secret(one: Difference) -> Difference:
    if one.what.rpartition(".")[2] not in SECRETS or one.now.startswith("{{ prefect.blocks."):
        return one
    return Difference(what=one.what, now="a value", wanted=one.wanted)


def look_at_pool(client: SyncPrefectClient, shell: Shell, pool: str, kind: Kind, size: Size) -> Part:
    """One work pool.

    Raises:
        StageError: it is of another kind, which cannot be changed.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        stands = client.read_work_pool(pool)
    except ObjectNotFound:
        stands = None
    if stands and stands.type != kind:
        raise StageError(
            f"work pool {pool} is there and is of another type, which cannot be changed",
            measured=stands.type,
            limit=kind,
            remedy=f"Deploy with --type {stands.type}, or delete the pool.",
        )
    there = stands.base_job_template if stands else {}
    gpus = size.gpus if size.gpus is not None else int(asks_for_gpu(there) if there else True)
    template = shell.fill(declared(pool, kind, gpus), there)
    template = merged(template, there) if stands else template
    at_first, asked = size.at_first(pool), size.asked(pool)
    return Part(
        name=f"work pool {pool}",
        differences=pool_differences(template, stands, kind=kind, at_first=at_first, asked=asked),
        make=partial(_make, client, pool, stands, kind, template, at_first, asked),
    )


def _make(
    client: SyncPrefectClient,
    pool: str,
    stands: WorkPool | None,
    kind: Kind,
    template: dict[str, Any],
    at_first: int,
    asked: int | None,
) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    if stands is None:
        limit = asked or at_first
        client.create_work_pool(
            WorkPoolCreate(name=pool, type=kind, base_job_template=template, concurrency_limit=limit)
        )
        return
    changed: dict[str, Any] = {"base_job_template": template} if template != stands.base_job_template else {}
    if asked is not None and asked != stands.concurrency_limit:
        changed["concurrency_limit"] = asked
    client.update_work_pool(pool, WorkPoolUpdate(**changed))


def look_at_limit(client: SyncPrefectClient, name: str, at_first: int, asked: int | None) -> Part:
    """A global concurrency limit: made where there is none, and later changed only where that is asked for by name."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
    from prefect.exceptions import ObjectNotFound

    part = f"concurrency limit {name}"
    try:
        stands = client.read_global_concurrency_limit_by_name(name).limit
    except ObjectNotFound:
        first = asked or at_first
        return Part(
            name=part,
            differences=[Difference(wanted=str(first))],
            make=lambda: client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=first)),
        )
    if asked is None or asked == stands:
        return Part(name=part, differences=[], make=lambda: None)
    return Part(
        name=part,
        differences=[Difference(now=str(stands), wanted=str(asked))],
        make=lambda: client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=asked)),
    )
