"""Events reach the server once and are known to; a promotion stands whether or not anyone could be told."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import logging
import uuid

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect_api.events import MODEL_PROMOTED, MODEL_ROLLED_BACK, Announcement, deliver, promotion, stands, tell
from flows.registry.journal import JOURNAL, head, history
from flows.registry.projection import reconcile, rollback
from stages.runtime.contract import StageError, Unavailable
from tests.flows.prefect_server import events, prefect_api
from tests.flows.registry.test_projection import ALIAS, MODEL, candidate, engine, registry, release, served

NOWHERE = "http://127.0.0.1:9/api"


def announcement(name="enginery.test", **labels):
    resource = {"prefect.resource.id": f"enginery.test.{uuid.uuid4()}", **labels}
    return Announcement(id=uuid.uuid4(), event=name, resource=resource, payload={"a": {"b": [1, None]}})


def told(api, name, model):
    return [one for one in events(api, name) if one["resource"].get("enginery.model") == model]


def test_event_delivered_twice_stands_once_with_all_it_says(prefect_api):
    one = announcement(f"enginery.{uuid.uuid4()}", label="x")
    assert not stands(one.id)
    assert deliver(one) and stands(one.id) and deliver(one)
    (found,) = events(prefect_api, one.event)
    assert found["id"] == str(one.id) and found["resource"] == one.resource and found["payload"] == one.payload


def test_event_that_is_not_on_record_yet_is_not_said_to_stand(prefect_api, monkeypatch):
    one = announcement(f"enginery.{uuid.uuid4()}")
    with monkeypatch.context() as patch:
        patch.setattr("flows.prefect_api.events.stands", lambda identity: False)
        assert not deliver(one, confirm_s=0.1)
    assert deliver(one) and len(events(prefect_api, one.event)) == 1


def test_event_that_the_server_refuses_or_cannot_take_is_an_error(prefect_api):
    with pytest.raises(StageError, match="refused; measured HTTP 422"):
        deliver(Announcement(id=uuid.uuid4(), event="x", resource={"no": "id"}, payload={}))
    with temporary_settings({PREFECT_API_URL: NOWHERE}), pytest.raises(Unavailable, match="no Prefect server answers"):
        deliver(announcement())


def test_promotion_and_rollback_are_told_with_what_a_deployer_needs(prefect_api, registry, engine):
    model = f"told-{uuid.uuid4()}"
    for letter in "ab":
        release(registry, candidate(registry, letter, model=model), engine, ALIAS, why=f"because {letter}")
    release(registry, candidate(registry, "b", model=model), engine, ALIAS)  # moves nothing
    rollback(registry, model, ALIAS, why="slow")
    two, one = told(prefect_api, MODEL_PROMOTED, model)
    (back,) = told(prefect_api, MODEL_ROLLED_BACK, model)
    last = history(registry.objects, model)[1]
    assert two["payload"] == {
        "model": model,
        "alias": ALIAS,
        "version": "2",
        "previous": "1",
        "fingerprint": "b" * 64,
        "targets": {"onnxruntime:cpu": "judged", "tensorrt_rtx:sm_89": "compiled, not judged"},
        "run": last.candidate.run,
        "who": last.who,
        "why": "because b",
    }
    assert two["id"] == str(promotion(model, last).id) != one["id"]
    assert (one["payload"]["version"], one["payload"]["previous"]) == ("1", None)
    assert (back["payload"]["version"], back["payload"]["previous"], back["payload"]["why"]) == ("1", "2", "slow")
    assert back["resource"]["prefect.resource.name"] == f"{model}@{ALIAS}"


def test_promotion_stands_where_nobody_can_be_told_and_reconcile_tells(prefect_api, registry, engine, caplog):
    model = f"late-{uuid.uuid4()}"
    with temporary_settings({PREFECT_API_URL: NOWHERE}), caplog.at_level(logging.WARNING):
        assert release(registry, candidate(registry, "a", model=model), engine, ALIAS).moved
    assert f"`enginery reconcile {model}` will" in caplog.text
    assert registry.client.get_model_version_by_alias(model, ALIAS) and head(registry.objects, model, ALIAS)
    assert told(prefect_api, MODEL_PROMOTED, model) == []
    assert reconcile(registry, model) == [] and len(told(prefect_api, MODEL_PROMOTED, model)) == 1
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        caplog.clear()
        tell(registry.objects, model)  # told already: the server is not even asked
    assert caplog.text == "" and len(history(registry.objects, model)) == 1


def test_promotion_whose_event_is_not_on_record_is_told_again(prefect_api, registry, engine, monkeypatch, caplog):
    model = f"slow-{uuid.uuid4()}"
    with monkeypatch.context() as patch:
        patch.setattr("flows.prefect_api.events.deliver", lambda one: False)
        release(registry, candidate(registry, "a", model=model), engine, ALIAS)
    assert "not on record yet" in caplog.text
    assert not registry.objects.stat(f"{JOURNAL}{model}/00000001.told.json")
    reconcile(registry, model)
    assert len(told(prefect_api, MODEL_PROMOTED, model)) == 1


def test_promotion_without_a_server_tells_nobody(registry, engine, monkeypatch, caplog):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    release(registry, candidate(registry, "a"), engine, ALIAS)
    assert int(served(registry)) == 1 and caplog.text == ""
    assert [one.key for one in registry.objects.list(JOURNAL)] == [f"{JOURNAL}{MODEL}/00000001.json"]
