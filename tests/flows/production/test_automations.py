"""The automations on a real server: arrivals start runs, lost runs crash, stuck queues are told of."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import time
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import DoNothing, SendNotification
from prefect.events.related import tags_as_related_resources
from prefect.states import Completed, Running
from pydantic import BaseModel

from flows.prefect_api.events import Announcement, _post, _send
from flows.prefect_api.flow_run_tag import OURS
from flows.prefect_api.retry import AWAY_S
from flows.production.automations import HEARTBEAT, apply, on_arrival, queue_alert, zombies
from flows.recipe.model import Recipe
from flows.triggers.on_checkpoint import optimize_checkpoint
from tests.flows.pipeline.tiny_run import place, sealed
from tests.flows.prefect_server import deployed, events, eventually, prefect_api, runs_of
from tests.flows.triggers.test_watch import recipe


@pytest.fixture
def client(prefect_api):
    with get_client(sync_client=True) as made:
        yield made


@flow(name="one")
def one(checkpoint: str = "") -> str:
    return checkpoint


def sent(event, resource, **payload):
    labels = resource if isinstance(resource, dict) else {"prefect.resource.id": resource}
    _send(Announcement(id=uuid.uuid4(), event=event, resource=labels, payload=payload))


def alerts(api, pool):
    found = events(api, "prefect.automation.triggered")
    return [one for one in found if one["resource"]["prefect.resource.name"] == f"enginery: work pool {pool} is stuck"]


def test_arrival_starts_its_own_recipes_deployment_with_the_checkpoint(prefect_api):
    names = [f"own-{uuid.uuid4()}", f"other-{uuid.uuid4()}"]
    own, other = (deployed(name) for name in names)
    for kind in ("checkpoint.created", "registry.alias_moved", "model.promoted"):
        resource = {"prefect.resource.id": f"enginery.test.{uuid.uuid4()}", "enginery.recipe": names[0]}
        sent(f"enginery.{kind}", resource, checkpoint=f"s3://b/{kind}#{'a' * 64}")
    assert eventually(lambda: len(runs_of(prefect_api, own)) == 2)
    given = {run["parameters"]["checkpoint"] for run in runs_of(prefect_api, own)}
    assert given == {f"s3://b/checkpoint.created#{'a' * 64}", f"s3://b/registry.alias_moved#{'a' * 64}"}
    assert {run["parameters"]["recipe"] for run in runs_of(prefect_api, own)} == {names[0]}
    assert runs_of(prefect_api, other) == []


def test_arrival_starts_the_real_flow_by_the_form_of_its_parameters(prefect_api, client):
    """The deployment's own parameters hold the recipe, and the server checks all of them against the flow's schema."""
    made = recipe(f"real-{uuid.uuid4()}")
    held = {"recipe": made.model_dump(mode="json", by_alias=True, exclude_none=True)}
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(optimize_checkpoint)
    deployment = client.create_deployment(
        client.create_flow(optimize_checkpoint),
        f"on-{made.name}",
        parameters=held,
        parameter_openapi_schema=schema.model_dump(),
        enforce_parameter_schema=True,
    )
    apply(client, [on_arrival(made.name, deployment)])
    resource = {"prefect.resource.id": f"enginery.test.{uuid.uuid4()}", "enginery.recipe": made.name}
    sent("enginery.checkpoint.created", resource, checkpoint="s3://b/x")
    (run,) = eventually(lambda: runs_of(prefect_api, deployment))
    assert run["parameters"]["checkpoint"] == "s3://b/x"
    assert Recipe.model_validate(run["parameters"]["recipe"]) == made


def beat(run):
    """A heartbeat as Prefect's engine sends it: with the tags of the flow run."""
    resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
    related = [one.model_dump(mode="json") for one in tags_as_related_resources(run.tags)]
    _post(
        "/events",
        [
            {
                "id": str(uuid.uuid4()),
                "event": HEARTBEAT,
                "occurred": datetime.now(UTC).isoformat(),
                "resource": resource,
                "related": related,
                "payload": {},
            }
        ],
    )


@pytest.mark.fault
def test_silence_crashes_a_lost_run_and_tells_of_a_stuck_queue(prefect_api, client):
    pool, fine = f"stuck-{uuid.uuid4()}", f"fine-{uuid.uuid4()}"
    apply(client, [zombies(within_s=10), queue_alert(pool, unready_s=10), queue_alert(fine, unready_s=10)])
    lost, alive, ended = (client.create_flow_run(one, state=Running(), tags=[OURS]) for _ in range(3))
    foreign = client.create_flow_run(one, state=Running(), tags=["theirs"])
    for name in (pool, fine):
        labels = {"prefect.resource.id": f"prefect.work-pool.{uuid.uuid4()}", "prefect.resource.name": name}
        sent("prefect.work-pool.not-ready", labels)
    # Prefect weighs events side by side: what arrives within a moment may be weighed in any order.
    time.sleep(2)
    sent("prefect.work-pool.ready", labels)
    for run in (foreign, lost, alive, ended):
        beat(run)
    client.set_flow_run_state(ended.id, Completed(), force=True)

    def state(run):
        return client.read_flow_run(run.id).state

    def both():
        beat(alive)
        return state(lost).type == StateType.CRASHED and alerts(prefect_api, pool)

    assert eventually(both, 40)
    assert "No heartbeat for 10 s" in state(lost).message
    assert state(alive).type == StateType.RUNNING and state(foreign).type == StateType.RUNNING
    assert state(ended).type == StateType.COMPLETED
    assert alerts(prefect_api, fine) == []
    apply(client, [zombies()])  # the tests beside it start runs without heartbeats


def test_lost_runs_are_waited_for_longer_than_any_outage_that_a_run_outlasts():
    assert zombies().trigger.within >= timedelta(seconds=2 * AWAY_S + 180)  # a heartbeat may come only every 180 s


def test_run_without_a_deployment_bears_the_tag_that_the_automation_knows(prefect_api, client, place):
    def runs():
        return {run.id: run.tags for run in client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=200)}

    before = runs()
    place.run()
    assert [OURS in tags for run, tags in runs().items() if run not in before] == [True]


def test_notification_goes_to_the_block_that_is_given():
    (action,) = queue_alert("gpu", block=(block := uuid.uuid4())).actions
    assert isinstance(action, SendNotification) and action.block_document_id == block
    assert "gpu" in action.subject and "{{ event.event }}" in action.body


def test_apply_changes_only_what_differs_and_leaves_one_of_a_name(client):
    name, deployment = f"again-{uuid.uuid4()}", uuid.uuid4()
    wanted = on_arrival(name, deployment)
    assert apply(client, [wanted]) == [wanted.name] and apply(client, [wanted]) == []
    other = on_arrival(name, uuid.uuid4())
    assert apply(client, [other]) == [wanted.name] and apply(client, [other]) == []
    client.create_automation(wanted)
    apply(client, [other])
    (stands,) = client.read_automations_by_name(wanted.name)
    assert stands.actions == other.actions
    assert len(client.read_automations_by_name(wanted.name)) == 1
    client.pause_automation(stands.id)
    assert apply(client, [other]) == [] and apply(client, [wanted]) == [wanted.name]
    assert not client.read_automations_by_name(wanted.name)[0].enabled  # a person's pause is left alone


def test_alert_that_a_person_made_tell_somebody_goes_on_telling(client):
    pool = f"told-{uuid.uuid4()}"
    apply(client, [queue_alert(pool)])
    (stands,) = client.read_automations_by_name(queue_alert(pool).name)
    assert [type(action) for action in stands.actions] == [DoNothing]
    told = queue_alert(pool, block=uuid.uuid4())
    apply(client, [told])
    assert apply(client, [queue_alert(pool)]) == []
    assert apply(client, [queue_alert(pool, unready_s=60)]) == [told.name]
    (stands,) = client.read_automations_by_name(told.name)
    assert stands.actions == told.actions and stands.trigger.within == timedelta(seconds=60)
