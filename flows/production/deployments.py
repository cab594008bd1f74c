"""The deployments of infra/prefect.yaml: what they run is declared; whether and how much they run is the operator's.

Left as they stand: a pause, a schedule that was switched on or off, limits, work queues, and parameters, tags, job
variables and schedules that are not declared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from flows.production.differences import Difference, Part, compared, shown
from flows.production.variables import Shell
from stages.runtime.fingerprint import ROOT

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

_WHEN = ("cron", "timezone", "interval", "rrule")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One deployment as infra/prefect.yaml says it, its names unfilled.

    Attributes:
        flow: name of its flow.
        said: its entry.
        pull: the steps before its flow is loaded.
        schema: the form of its flow's parameters.
    """

    flow: str
    said: Mapping[str, Any]
    pull: list[dict[str, Any]]
    schema: dict[str, Any]

    @property
    def name(self) -> str:
        """What it is called on the server."""
        return f"{self.flow}/{self.said['name']}"

    @property
    def schedules(self) -> list[Mapping[str, Any]]:
        """Its schedules, each with a slug."""
        return list(self.said.get("schedules", []))


def all_declared() -> list[Declared]:
    """What infra/prefect.yaml declares."""
    from prefect.flows import Flow, load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    said = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text(encoding="utf-8"))
    found = []
    for one in said["deployments"]:
        flow: Flow[Any, Any] = load_flow_from_entrypoint(one["entrypoint"])
        schema = parameter_schema(flow).model_dump_for_openapi()
        found.append(Declared(flow=flow.name, said=one, pull=said["pull"], schema=schema))
    return found


def wanted_fields(one: Declared, shell: Shell, stands: DeploymentResponse | None) -> dict[str, Any]:
    """The fields that are declared, each with what an operator added to it."""
    there = stands.parameters if stands else {}
    pool = one.said["work_pool"]
    wanted = {
        "description": one.said["description"],
        "tags": sorted({*one.said["tags"], *(stands.tags if stands else ())}),
        "parameters": {**there, **shell.fill(one.said.get("parameters", {}), there)},
        "work_pool_name": pool["name"],
        "entrypoint": one.said["entrypoint"],
        "pull_steps": one.pull,
        "parameter_openapi_schema": one.schema,
        "enforce_parameter_schema": True,
    }
    if "job_variables" in pool:
        wanted["job_variables"] = {**(stands.job_variables if stands else {}), **pool["job_variables"]}
    return wanted


def deployment_differences(
    one: Declared, wanted: Mapping[str, Any], stands: DeploymentResponse | None
) -> list[Difference]:
    """What of a deployment is not as declared."""
    if stands is None:
        return [Difference(wanted=f"in work pool {wanted['work_pool_name']}")]
    found = [
        difference
        for name, value in changed_fields(wanted, stands).items()
        for difference in compared(_standing(stands, name), value, name)
    ]
    schedules = {schedule.slug: schedule for schedule in stands.schedules}
    for schedule in one.schedules:
        standing = schedules.get(schedule["slug"])
        if standing is None:
            found.append(Difference(what=f"schedule {schedule['slug']}", wanted=shown(_when(schedule))))
        elif not _same_times(standing.schedule, schedule):
            times = {name: getattr(standing.schedule, name, None) for name in _when(schedule)}
            found.append(
                Difference(what=f"schedule {schedule['slug']}", now=shown(times), wanted=shown(_when(schedule)))
            )
    if "concurrency_limit" in one.said and stands.global_concurrency_limit is None:
        found.append(Difference(what="concurrency limit", wanted=shown(one.said["concurrency_limit"])))
    return found


def changed_fields(wanted: Mapping[str, Any], stands: DeploymentResponse) -> dict[str, Any]:
    """Those of the wanted fields that are not so."""
    return {name: value for name, value in wanted.items() if _standing(stands, name) != value}


def _standing(stands: DeploymentResponse, name: str) -> Any:
    value = getattr(stands, name)
    return sorted(value) if name == "tags" else value


def _when(schedule: Mapping[str, Any]) -> dict[str, Any]:
    return {name: schedule[name] for name in _WHEN if name in schedule}


def _same_times(standing: Any, schedule: Mapping[str, Any]) -> bool:
    found = {name: getattr(standing, name, None) for name in _when(schedule)}
    if "interval" in found and found["interval"] is not None:
        found["interval"] = found["interval"].total_seconds()
    return found == _when(schedule)


def look_at_deployment(client: SyncPrefectClient, shell: Shell, one: Declared) -> Part:
    """One deployment."""
    from prefect.exceptions import ObjectNotFound

    try:
        stands = client.read_deployment_by_name(one.name)
    except ObjectNotFound:
        stands = None
    wanted = wanted_fields(one, shell, stands)
    make: Callable[[], object] = partial(_create, client, one, wanted)
    if stands is not None:
        make = partial(_update, client, one, wanted, stands)
    return Part(name=f"deployment {one.name}", differences=deployment_differences(one, wanted, stands), make=make)


def _create(client: SyncPrefectClient, one: Declared, wanted: Mapping[str, Any]) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    client.create_deployment(
        client.create_flow_from_name(one.flow),
        one.said["name"],
        schedules=[
            DeploymentScheduleCreate(schedule=_when(each), active=each["active"], slug=each["slug"])
            for each in one.schedules
        ],
        path=one.pull[0]["prefect.deployments.steps.set_working_directory"]["directory"],
        **_limit(one),
        **wanted,
    )


def _update(client: SyncPrefectClient, one: Declared, wanted: Mapping[str, Any], stands: DeploymentResponse) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate

    changed = changed_fields(wanted, stands)
    if stands.global_concurrency_limit is None:
        changed |= _limit(one)
    if changed:
        client.update_deployment(stands.id, DeploymentUpdate(**changed))
    schedules = {schedule.slug: schedule for schedule in stands.schedules}
    for each in one.schedules:
        new = DeploymentScheduleCreate(schedule=_when(each), active=each["active"], slug=each["slug"])
        standing = schedules.get(each["slug"])
        if standing is None:
            client.create_deployment_schedules(stands.id, [new])
        elif not _same_times(standing.schedule, each):
            client.update_deployment_schedule(stands.id, standing.id, schedule=new.schedule)


def _limit(one: Declared) -> dict[str, Any]:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyOptions

    if "concurrency_limit" not in one.said:
        return {}
    limit = ConcurrencyLimitConfig.model_validate(one.said["concurrency_limit"])
    return {
        "concurrency_limit": limit.limit,
        "concurrency_options": ConcurrencyOptions(collision_strategy=limit.collision_strategy),
    }
