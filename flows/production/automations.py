"""The Prefect server's automations, as code: what starts a run, what ends a lost one, what tells of a stuck queue.

Pure functions say what is wanted; `apply` makes the server have it, by name, as often as one likes.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, DoNothing, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, CompoundTrigger, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from flows.prefect_api.events import ALIAS_MOVED, CHECKPOINT_CREATED
from flows.prefect_api.retry import answered
from stages.runtime.contract import StageError

HEARTBEAT = "prefect.flow-run.heartbeat"
_NOT_RUNNING = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "AwaitingRetry", "Scheduled")
"""A flow run in any of these sends no heartbeat and is no zombie."""


def arrival_name(recipe: str) -> str:
    """What the automation of a recipe is called."""
    return f"enginery: run {recipe} on arrival"


def on_arrival(recipe: str, deployment: UUID, source: str = "") -> AutomationCore:
    """A checkpoint that arrived, or an alias that moved, for a recipe: run a deployment on it.

    Args:
        recipe: its name.
        deployment: what is run.
        source: where the recipe is read, which the deployment is given; empty for the deployment's own.
    """
    return AutomationCore(
        name=arrival_name(recipe),
        description="One run for each checkpoint that `enginery watch` announces, and each version under an alias.",
        trigger=EventTrigger(
            expect={CHECKPOINT_CREATED, ALIAS_MOVED},
            match=ResourceSpecification({"enginery.recipe": recipe}),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            RunDeployment(
                deployment_id=deployment,
                parameters={
                    **({"recipe": source} if source else {}),
                    "checkpoint": {"__prefect_kind": "jinja", "template": "{{ event.payload.checkpoint }}"},
                },
            )
        ],
    )


def zombies(within_s: float = 90) -> AutomationCore:
    """Flow runs whose process is gone: no heartbeat for so long, and no word of an end, makes them Crashed.

    Workers must set PREFECT_FLOWS_HEARTBEAT_FREQUENCY to 30, which is Prefect's shortest; by default it is 180, and
    every run would be taken for lost.
    """
    return AutomationCore(
        name="enginery: crash lost runs",
        description=f"A flow run that was running and sent no heartbeat for {within_s:g} s is marked as crashed.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _NOT_RUNNING)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=within_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No heartbeat for {within_s:g} s: the process is gone."
            )
        ],
    )


def queue_alert(pool: str, *, block: UUID | None = None, unready_s: float = 120, late: int = 3) -> AutomationCore:
    """A work pool that has had no live worker for a while, or whose runs start late.

    With a notification block of the server (Slack, e-mail, ...) it is told there. Without one nothing leaves the
    server: the automation's own event, `prefect.automation.triggered`, stands in its feed and its log.

    Args:
        pool: name of the work pool.
        block: id of the notification block.
        unready_s: how long no worker may be there.
        late: so many runs that start late within five minutes.
    """
    tell: ActionTypes = DoNothing()
    if block:
        tell = SendNotification(
            block_document_id=block,
            subject=f"Enginery: work pool {pool} is stuck",
            body=f"Work pool {pool} has no live worker or its runs are late: {{{{ event.event }}}}.",
        )
    return AutomationCore(
        name=f"enginery: work pool {pool} is stuck",
        description=f"No live worker for {unready_s:g} s, or {late} runs that start late within five minutes.",
        trigger=CompoundTrigger(
            require="any",
            triggers=[
                EventTrigger(
                    after={"prefect.work-pool.not-ready"},
                    expect={"prefect.work-pool.ready"},
                    match=ResourceSpecification({"prefect.resource.name": pool}),
                    for_each={"prefect.resource.id"},
                    posture=Posture.Proactive,
                    within=timedelta(seconds=unready_s),
                ),
                EventTrigger(
                    expect={"prefect.flow-run.Late"},
                    match_related=ResourceSpecification(
                        {"prefect.resource.role": "work-pool", "prefect.resource.name": pool}
                    ),
                    posture=Posture.Reactive,
                    threshold=late,
                    within=timedelta(minutes=5),
                ),
            ],
            within=timedelta(0),
        ),
        actions=[tell],
    )


def standard(
    client: SyncPrefectClient,
    recipe: str,
    *,
    source: str = "",
    deployment: str = "optimize/on-checkpoint",
    pools: Iterable[str] = ("flows", "cpu", "gpu"),
    block: UUID | None = None,
) -> list[AutomationCore]:
    """All that a server of Enginery has.

    Raises:
        StageError: the deployment is not there.
    """
    with answered():
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise StageError(
                f"the Prefect server has no deployment {deployment}", remedy="Deploy infra/prefect.yaml first."
            ) from error
    return [on_arrival(recipe, found.id, source), zombies(), *(queue_alert(pool, block=block) for pool in pools)]


def apply(client: SyncPrefectClient, wanted: Iterable[AutomationCore]) -> list[str]:
    """Make the server's automations of these names be these; returns the names of those that were not.

    Raises:
        Unavailable: the server does not answer.
        StageError: it refuses.
    """
    changed = []
    with answered():
        for automation in wanted:
            stands = client.read_automations_by_name(automation.name)
            for twin in stands[1:]:
                client.delete_automation(twin.id)
            if not stands:
                client.create_automation(automation)
            elif _same(stands[0], automation):
                continue
            else:
                client.update_automation(stands[0].id, automation)
            changed.append(automation.name)
    return changed


def _same(stands: AutomationCore, wanted: AutomationCore) -> bool:
    # Not `enabled`: one that a person paused stays paused.
    return all(getattr(stands, name) == getattr(wanted, name) for name in ("description", "trigger", "actions"))
