"""A promotion is told once with what a deployer needs, and stands whether or not anyone could be told."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import logging
import uuid

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect_api.events import MODEL_PROMOTED, MODEL_ROLLED_BACK
from flows.registry.announce import promotion, tell
from flows.registry.journal import JOURNAL, head, history
from flows.registry.projection import reconcile, rollback
from tests.flows.prefect_server import events, prefect_api
from tests.flows.registry.test_projection import ALIAS, MODEL, candidate, engine, registry, release, served

NOWHERE = "http://127.0.0.1:9/api"


def told(api, name, model):
    return [one for one in events(api, name) if one["resource"].get("enginery.model") == model]


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
        patch.setattr("flows.registry.announce.deliver", lambda one: False)
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
