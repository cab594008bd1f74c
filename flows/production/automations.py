"""The Prefect server's automations, as code: what starts a run, what ends a lost one, what tells of a stuck queue.

Pure functions say what is wanted; `look_at_automation` and `apply` make the server have it, by name, as often as one
likes. One that a person switched off stays off, and whom an alert tells is what a person says on its page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import AutomationSort
from prefect.events.actions import ActionTypes, ChangeFlowRunState, DoNothing, RunDeployment, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from flows.prefect_api.events import ALIAS_MOVED, CHECKPOINT_CREATED
from flows.prefect_api.flow_run_tag import OURS
from flows.prefect_api.retry import answered
from flows.production.differences import Difference, Part, compared
from flows.production.variables import Shell
from flows.recipe.read import load_recipe

ON_ARRIVAL = "optimize/on-checkpoint"
HEARTBEAT = "prefect.flow-run.heartbeat"
LOST_AFTER_S = 900.0
"""Three times as long as a service may be away."""
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


def zombies(within_s: float = LOST_AFTER_S) -> AutomationCore:
    """Our flow runs whose process is gone: no heartbeat for so long, and no word of an end, makes them Crashed.

    Prefect's clock goes on while its API is away and no heartbeat can arrive, so the time is long: a healthy run must
    outlast an outage. A lost step is found sooner, by the run that follows it. Heartbeats come every 30 to 180 s, as
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY says.
    """
    return AutomationCore(
        name="enginery: crash lost runs",
        description=f"A flow run of Enginery that sent no heartbeat for {within_s:g} s is marked as crashed.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _NOT_RUNNING)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{OURS}"}
            ),
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


def queue_alert(pool: str, *, block: UUID | None = None, unready_s: float = 120) -> AutomationCore:
    """A work pool that has had no live worker for a while. Runs that wait for a pool at its limit are no alarm.

    With a notification block of the server (Slack, e-mail, ...) it is told there. Without one nothing leaves the
    server: the automation's own event, `prefect.automation.triggered`, stands in its feed and its log, until a person
    gives it another action on its page.

    Args:
        pool: name of the work pool.
        block: id of the notification block.
        unready_s: how long no worker may be there.
    """
    tell: ActionTypes = DoNothing()
    if block:
        tell = SendNotification(
            block_document_id=block,
            subject=f"Enginery: work pool {pool} is stuck",
            body=f"Work pool {pool} has no live worker: {{{{ event.event }}}}.",
        )
    return AutomationCore(
        name=f"enginery: work pool {pool} is stuck",
        description=f"No live worker for {unready_s:g} s.",
        trigger=EventTrigger(
            after={"prefect.work-pool.not-ready"},
            expect={"prefect.work-pool.ready"},
            match=ResourceSpecification({"prefect.resource.name": pool}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            within=timedelta(seconds=unready_s),
        ),
        actions=[tell],
    )


def look_at_arrivals(client: SyncPrefectClient, shell: Shell) -> Part:
    """The automation that runs the recipe on what arrives; before its deployment stands there is only that to say."""
    try:
        stands = client.read_deployment_by_name(ON_ARRIVAL)
    except ObjectNotFound:
        stands = None
    given = shell.given.get("ARRIVAL_RECIPE", "")
    source = given or str(stands.parameters.get("recipe", "") if stands else "")
    # A shell that does not name the recipe may have no way to read it.
    recipe = "" if given or not stands else _recipe_on_arrival(client, stands.id, source)
    if not recipe and source:
        recipe = load_recipe(source).name
    if stands is None or not recipe:
        return Part(name="automation on arrival", differences=[Difference(wanted="on")], make=lambda: None)
    return look_at_automation(client, on_arrival(recipe, stands.id, source))


def _recipe_on_arrival(client: SyncPrefectClient, deployment: UUID, source: str) -> str:
    """The recipe for which an automation of ours starts this deployment with this source; empty for none."""
    for one in _all_automations(client):
        names = isinstance(one.trigger, EventTrigger) and one.trigger.match.get("enginery.recipe")
        if (
            names
            and one.name == arrival_name(names[0])
            and any(
                isinstance(action, RunDeployment)
                and action.deployment_id == deployment
                and (action.parameters or {}).get("recipe") == source
                for action in one.actions
            )
        ):
            return str(names[0])
    return ""


def _all_automations(client: SyncPrefectClient) -> Iterator[Automation]:
    # 3.8.8's server refuses the client's own defaults, and gives 200 at a time.
    for page in count():
        found = client.read_automations(sort=AutomationSort.NAME_ASC, limit=200, offset=200 * page)
        yield from found
        if len(found) < 200:
            return


def apply(client: SyncPrefectClient, wanted: Iterable[AutomationCore]) -> list[str]:
    """Make the server's automations of these names be these; returns the names of those that were not.

    Raises:
        Unavailable: the server does not answer.
        StageError: it refuses.
    """
    changed = []
    with answered():
        for automation in wanted:
            part = look_at_automation(client, automation)
            if part.differences:
                part.make()
                changed.append(automation.name)
    return changed


def look_at_automation(client: SyncPrefectClient, wanted: AutomationCore) -> Part:
    """One automation, by its name."""
    stands = client.read_automations_by_name(wanted.name)
    return Part(
        name=f"automation {wanted.name}",
        differences=automation_differences(wanted, stands),
        make=partial(_make, client, wanted, stands),
    )


def automation_differences(wanted: AutomationCore, stands: Sequence[AutomationCore]) -> list[Difference]:
    """What of an automation is not as declared; it may stand more than once."""
    if not stands:
        return [Difference(wanted="on")]
    found = compared(_declared(stands[0], wanted), _declared(wanted, wanted))
    if twins := len(stands) - 1:
        found.append(Difference(what="others of its name", now=str(twins), wanted="removed"))
    return found


def _declared(one: AutomationCore, wanted: AutomationCore) -> dict[str, object]:
    # Not `enabled`, and not what is done where nothing is declared.
    fields = {"description", "trigger"} | (set() if _tells_nobody(wanted) else {"actions"})
    return one.model_dump(include=fields)


def _tells_nobody(wanted: AutomationCore) -> bool:
    return all(isinstance(action, DoNothing) for action in wanted.actions)


def _make(client: SyncPrefectClient, wanted: AutomationCore, stands: Sequence[Automation]) -> None:
    for twin in stands[1:]:
        client.delete_automation(twin.id)
    if not stands:
        client.create_automation(wanted)
        return
    kept = {"enabled": stands[0].enabled, **({"actions": stands[0].actions} if _tells_nobody(wanted) else {})}
    if automation_differences(wanted, stands[:1]):
        client.update_automation(stands[0].id, wanted.model_copy(update=kept))
