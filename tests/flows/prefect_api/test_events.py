"""Events reach the server once and are known to."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import uuid

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect_api.events import Announcement, deliver, stands
from stages.runtime.contract import StageError, Unavailable
from tests.flows.prefect_server import events, prefect_api

NOWHERE = "http://127.0.0.1:9/api"


def announcement(name="enginery.test", **labels):
    resource = {"prefect.resource.id": f"enginery.test.{uuid.uuid4()}", **labels}
    return Announcement(id=uuid.uuid4(), event=name, resource=resource, payload={"a": {"b": [1, None]}})


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
