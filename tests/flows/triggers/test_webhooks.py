"""MLflow's webhooks, signed and sent by MLflow's own code over TLS; polling finds the same and sends it once."""

# ruff: noqa: F401, F811 - fixtures that other modules define are imported and then named as arguments

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import httpx
import pytest
import requests
from fastapi import HTTPException
from fastapi.testclient import TestClient
from mlflow.entities.webhook import Webhook, WebhookAction, WebhookEntity, WebhookEvent, WebhookStatus
from mlflow.webhooks.delivery import _generate_hmac_signature, _send_webhook_request

from flows.cli import main
from flows.prefect_api.events import ALIAS_MOVED
from flows.recipe.model import Register
from flows.settings import settle
from flows.triggers import watch, webhooks
from flows.triggers.arrival_records import arrived, finished
from flows.triggers.watched_alias import Alias, arrival, parse, standing
from flows.triggers.webhooks import LARGEST_BYTES, SECRET, Announcer, application, verified
from stages.runtime.contract import StageError, Unavailable
from tests.flows.prefect_server import deployed, events, eventually, prefect_api, runs_of
from tests.flows.recorded import tracking_in
from tests.flows.triggers.test_watch import recipe

HUSH = "a secret that both sides share"
MODEL, ALIAS = "outside", "candidate"
CREATED = WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, WebhookAction.CREATED)


def signed(payload, *, secret=HUSH, delivery=None, stamp=None):
    """Body and headers of a delivery as MLflow makes them."""
    body = json.dumps(payload)
    delivery, stamp = delivery or str(uuid.uuid4()), str(int(time.time()) if stamp is None else stamp)
    signature = _generate_hmac_signature(secret, delivery, stamp, body)
    headers = {"X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": signature}
    return body.encode(), headers


def moved(version="1", model=MODEL, alias=ALIAS, entity="model_version_alias", action="created"):
    data = {"name": model, "alias": alias, "version": version}
    return {"entity": entity, "action": action, "timestamp": "2026-01-01T00:00:00+00:00", "data": data}


@pytest.fixture
def tracking(tmp_path):
    """A registry in which a model has three versions: of S3, of a logged model, of a tagged source."""
    made = tracking_in(tmp_path / "mlflow")
    made.client.create_registered_model(MODEL)
    made.client.create_model_version(MODEL, "s3://models/one")
    made.client.create_model_version(MODEL, "file-less/source")
    made.client.create_model_version(MODEL, "models-artifact", tags={"enginery.source": "hf://owner/name"})
    return made


@pytest.fixture
def hook(tracking, store):
    said = []
    announcer = Announcer(Alias(MODEL, ALIAS), "hooked", store, tracking, said.append)
    with TestClient(application(announcer, HUSH)) as client:
        client.said = said
        yield client


def post(client, payload, **how):
    body, headers = signed(payload, **how)
    return client.post("/", content=body, headers=headers)


def test_signature_of_mlflow_is_believed_and_no_other():
    now = 1_800_000_000
    body, headers = signed(moved(), delivery="d-1", stamp=now)
    given = {name.lower(): value for name, value in headers.items()}
    for later in (-300, 0, 300):
        assert verified(HUSH, given, body, now + later) == "d-1"
    wrong = [
        ("another secret", given, body, now),
        (HUSH, given, body + b" ", now),
        (HUSH, given | {"x-mlflow-delivery-id": "d-2"}, body, now),
        (HUSH, given | {"x-mlflow-timestamp": str(now + 1)}, body, now),
        (HUSH, given | {"x-mlflow-signature": given["x-mlflow-signature"][3:]}, body, now),
        (HUSH, given | {"x-mlflow-signature": "v1,é"}, body, now),
        (HUSH, {}, body, now),
        (HUSH, given, body, now + 301),
        (HUSH, given, body, now - 301),
    ]
    for case in wrong:
        with pytest.raises(HTTPException) as refused:
            verified(*case)
        assert refused.value.status_code == 401, case
    for stamp in ("", "soon"):
        body, headers = signed(moved(), stamp=stamp)
        with pytest.raises(HTTPException):
            verified(HUSH, {name.lower(): value for name, value in headers.items()}, body, now)


def test_webhook_that_is_not_to_be_believed_or_understood_is_refused(hook, store):
    assert hook.get("/health").json() == {"status": "ok"}
    assert post(hook, moved(), secret="x" * 20).status_code == 401
    assert post(hook, moved(), stamp=int(time.time()) - 400).status_code == 401
    assert hook.post("/", content=b"x" * (LARGEST_BYTES + 1)).status_code == 413
    for payload in ([], {"data": 1, "entity": "x", "action": "y"}, {}):
        assert post(hook, payload).status_code == 400, payload
    assert hook.get("/docs").status_code == hook.get("/openapi.json").status_code == 404
    assert finished(store.objects, "hooked") == set() and hook.said == []


def test_webhook_about_something_else_is_answered_and_ignored(hook, store):
    others = [moved(model="x"), moved(alias="x"), moved(action="deleted"), moved(entity="prompt_alias")]
    for payload in others:
        answer = post(hook, payload)
        assert (answer.status_code, answer.json()) == (200, {"status": "nothing to do"})
    assert list(store.objects.list("arrivals/")) == []


def test_webhook_and_polling_announce_a_version_once(prefect_api, hook, store, tracking, monkeypatch):
    deployment = deployed("hooked")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    tracking.client.set_registered_model_alias(MODEL, ALIAS, "1")
    answer = post(hook, moved("1"), delivery="d-1")
    assert (answer.status_code, answer.json()) == (200, {"status": "announced"})
    assert post(hook, moved("1"), delivery="d-1").status_code == 409  # a replay
    assert post(hook, moved("1"), delivery="d-2").status_code == 200  # the alias set again
    said = []

    def poll():
        settings = settle(store=store.uri)
        watch.watch(
            f"models:/{MODEL}@{ALIAS}", recipe("hooked"), settings, every_s=1, settle_s=0, once=True, say=said.append
        )

    poll()
    assert not any("announced" in line for line in said)
    tracking.client.set_registered_model_alias(MODEL, ALIAS, "3")
    poll()
    assert sum("announced" in line for line in said) == 1
    assert post(hook, moved("3")).status_code == 200
    assert eventually(lambda: len(runs_of(prefect_api, deployment)) == 2)
    ours = [one for one in events(prefect_api, ALIAS_MOVED) if one["resource"].get("enginery.recipe") == "hooked"]
    assert [one["payload"]["version"] for one in ours] == ["3", "1"]
    assert [one["payload"]["uri"] for one in ours] == ["hf://owner/name", "s3://models/one"]
    assert ours[0]["payload"]["model"] == MODEL and ours[0]["payload"]["alias"] == ALIAS


def test_webhook_is_taken_again_once_the_server_is_back(prefect_api, hook, store):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert post(hook, moved("2"), delivery="d-3").status_code == 503
    assert "was not announced" in hook.said[-1]
    assert post(hook, moved("2"), delivery="d-3").status_code == 200 and len(finished(store.objects, "hooked")) == 1
    answer = post(hook, moved("99"))
    assert answer.status_code == 422 and "99" in hook.said[-1]


@pytest.mark.parametrize("why", ["away", "not on record yet", "registry away", "told to an earlier process"])
def test_what_was_not_announced_is_made_good_without_another_webhook(prefect_api, store, tracking, monkeypatch, why):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    said, name = [], f"good-{why.replace(' ', '-')}"
    announcer = Announcer(Alias(MODEL, ALIAS), name, store, tracking, said.append)
    if why == "told to an earlier process":
        arrived(store.objects, arrival(tracking, announcer.alias, "1", name))
        arrived(store.objects, arrival(tracking, Alias(MODEL, "other"), "1", name))
    with TestClient(application(announcer, HUSH, every_s=0.5)) as client, monkeypatch.context() as patch:
        if why == "away":
            with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
                assert post(client, moved("1"), delivery="d").status_code == 503
        elif why == "not on record yet":
            # The server writes its events down each second, which may be this very moment.
            patch.setattr(webhooks, "CONFIRM_S", 0.0)
            patch.setattr("flows.prefect_api.events.stands", lambda _: False)
            assert post(client, moved("1"), delivery="d").status_code == 503
            patch.undo()
        elif why == "registry away":

            def away(*_):
                raise Unavailable("no MLflow answers")

            patch.setattr(webhooks, "arrival", away)
            assert post(client, moved("1"), delivery="d").status_code == 503
            patch.undo()
        assert eventually(lambda: finished(store.objects, name)), said
        if why != "told to an earlier process":
            assert post(client, moved("1"), delivery="d").status_code == 200, "MLflow may send it again"
    ours = [one for one in events(prefect_api, ALIAS_MOVED) if one["resource"].get("enginery.recipe") == name]
    assert [one["payload"]["version"] for one in ours] == ["1"]
    assert len(finished(store.objects, name)) == 1


def test_alias_without_a_source_that_fetch_speaks_leaves_the_recipes_own(tracking):
    alias = Alias(MODEL, ALIAS)
    assert standing(tracking, alias) is None and standing(tracking, Alias("none", ALIAS)) is None
    found = [arrival(tracking, alias, str(n), "r") for n in (1, 2, 3)]
    assert [one.uri for one in found] == ["s3://models/one", "", "hf://owner/name"]
    assert len({one.key for one in found}) == 3
    assert found[1].announcement().payload["checkpoint"] == f"#{found[1].key}"
    assert arrival(tracking, Alias(MODEL, "other"), "1", "r").key != found[0].key


def test_alias_that_the_recipe_promotes_to_itself_is_refused():
    own = recipe("own").model_copy(update={"register_as": Register(model=MODEL, alias=ALIAS)})
    with pytest.raises(StageError, match="each run would start another"):
        parse(f"models:/{MODEL}@{ALIAS}", own)
    assert parse(f"models:/{MODEL}@other", own) == Alias(MODEL, "other")
    assert parse(f"models:/{MODEL}@other", own).uri == f"models:/{MODEL}@other"
    with pytest.raises(StageError, match="names no alias"):
        parse(f"models:/{MODEL}", own)
    with pytest.raises(StageError, match="names no alias"):
        parse(f"models:/a:b@{ALIAS}", own)
    with pytest.raises(StageError, match="MLflow reserves the alias 'latest'"):
        parse(f"models:/{MODEL}@latest", own)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def asked(tmp_path, store, certificate, monkeypatch):
    monkeypatch.setenv(SECRET, HUSH)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("served").model_dump_json(exclude_none=True, exclude={"gates"}))
    cert, key = certificate
    tls = ["--cert", str(cert), "--key", str(key)]
    return ["hooks", f"models:/{MODEL}@{ALIAS}", "--recipe", str(path), *tls, "--store", store.uri, "--port", "0"]


@pytest.mark.fault
def test_mlflow_delivers_over_tls_to_the_command(prefect_api, asked, certificate, tracking, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri}
    with (tmp_path / "err").open("w") as errors:
        served = subprocess.Popen(
            [sys.executable, "-m", "flows", *asked],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[3],
        )
    with served:
        try:
            line = served.stdout.readline()
            assert line.startswith("listening on https://127.0.0.1:"), (tmp_path / "err").read_text()
            address = line.split()[2]
            hook = Webhook(
                webhook_id="w",
                name="w",
                url=address,
                events=[CREATED],
                creation_timestamp=0,
                last_updated_timestamp=0,
                status=WebhookStatus.ACTIVE,
                secret=HUSH,
            )
            with requests.Session() as session:
                session.trust_env = False  # as MLflow's own session, which takes no proxy or authorities from outside
                session.verify = str(certificate[0])
                answer = _send_webhook_request(hook, moved("1")["data"], CREATED, session)
                assert (answer.status_code, answer.json()) == (200, {"status": "announced"})
                hook._secret = "wrong" * 5
                assert _send_webhook_request(hook, moved("1")["data"], CREATED, session).status_code == 401
            with pytest.raises(httpx.ConnectError), httpx.Client(verify=ssl.create_default_context()) as stranger:
                stranger.post(address)
            with pytest.raises(httpx.TransportError):
                httpx.post(address.replace("https", "http"))
            assert served.stdout.readline().startswith("announced outside@candidate")
        finally:
            served.send_signal(signal.SIGTERM)
        assert served.wait(30) == 130


def test_hooks_command_refuses_to_listen_without_what_it_needs(asked, tmp_path, prefect_api, capsys, monkeypatch):
    def said(argv=asked):
        assert main(argv) == 1
        return capsys.readouterr().err

    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    cert = asked.index("--cert") + 1
    assert "no certificate with its key" in said([*asked[:cert], str(junk), *asked[cert + 1 :]])
    assert "no certificate with its key" in said([*asked[:cert], "/no/where.pem", *asked[cert + 1 :]])
    assert "cannot be listened on" in said([*asked, "--host", "192.0.2.1"])
    monkeypatch.setenv(SECRET, "short")
    assert "too short; measured 5 characters; limit 16" in said()
    monkeypatch.delenv(SECRET)
    assert "not set" in said()
    monkeypatch.delenv("PREFECT_API_URL")
    assert "Set PREFECT_API_URL" in said()


def test_deliveries_at_once_are_taken_once(prefect_api, hook):
    with ThreadPoolExecutor(4) as pool:
        # Each thread in a copy of this context, which holds the server's address.
        one = [pool.submit(copy_context().run, post, hook, moved("3"), delivery="d-at-once") for _ in range(4)]
    assert sorted(answer.result().status_code for answer in one) == [200, 409, 409, 409]
