"""MLflow's webhooks over TLS: an alias that moved is announced at once, where polling would find it later.

A webhook is believed when its signature is that of the shared secret, its time is fresh and its delivery is new. What
it says is looked up in the registry, so that the event is the very one that polling would send. MLflow sends a webhook
again only a few times within seconds: what Prefect has not confirmed by then is announced from here until it has.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from flows.prefect_api.events import ALIAS_MOVED, has_server
from flows.recipe.model import Recipe
from flows.settings import Settings
from flows.tracking.connect import Tracking, open_tracking
from flows.triggers.arrival_records import arrived, pending
from flows.triggers.watch import announce
from flows.triggers.watched_alias import Alias, arrival, parse
from stages.runtime.artifacts import Store
from stages.runtime.contract import StageError, Unavailable

SECRET = "ENGINERY_WEBHOOK_SECRET"  # noqa: S105 - the name of the variable that holds it
SHORTEST_SECRET = 16
FRESH_S = 300
LARGEST_BYTES = 1 << 20
CONFIRM_S = 10.0
"""MLflow gives up on an answer after 30 seconds."""
AGAIN_S = 60.0
"""Between two tries to announce what is not on record."""


@dataclass
class Deliveries:
    """The deliveries of the last minutes, each of which is taken once."""

    _taken: dict[str, float] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def take(self, delivery: str, now: float) -> bool:
        """Whether a delivery is new; it is taken then."""
        with self._guard:
            # Older ones are refused for their time, whichever side of now it lay on.
            self._taken = {one: when for one, when in self._taken.items() if now - when < 2 * FRESH_S}
            if delivery in self._taken:
                return False
            self._taken[delivery] = now
            return True

    def give_back(self, delivery: str) -> None:
        """A delivery that could not be acted on: MLflow sends it again under the same id."""
        with self._guard:
            self._taken.pop(delivery, None)


def verified(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> str:
    """The delivery id of a webhook that MLflow signed lately.

    Raises:
        HTTPException: 401, its signature or its time is not to be believed.
    """
    delivery, stamp = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
    signature = headers.get("x-mlflow-signature", "")
    signed = f"{delivery}.{stamp}.".encode() + body
    expected = b"v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest())
    if not delivery or not hmac.compare_digest(expected, signature.encode()):
        raise HTTPException(401, "the signature is not that of the shared secret")
    if not re.fullmatch(r"\d{1,15}", stamp) or abs(now - int(stamp)) > FRESH_S:
        raise HTTPException(401, f"the time is more than {FRESH_S} s off")
    return delivery


@dataclass(frozen=True)
class Announcer:
    """Brings what webhooks said to Prefect's server, and goes on until it has it on record.

    Attributes:
        unread: versions that could not be looked up while the registry was away.
    """

    alias: Alias
    recipe: str
    store: Store
    tracking: Tracking
    say: Callable[[str], None]
    unread: set[str] = field(default_factory=set)

    def moved(self, version: str) -> bool:
        """Announce that the alias was put on a version; whether the server has it on record.

        Raises:
            Unavailable: the registry or Prefect's server does not answer.
            StageError: there is no such version, or the server refuses.
        """
        try:
            found = arrival(self.tracking, self.alias, version, self.recipe)
        except Unavailable:
            self.unread.add(version)
            raise
        self.unread.discard(version)
        return announce(self.store, found, self.say, confirm_s=CONFIRM_S)

    def make_good(self) -> None:
        """Announce what is not on record yet: also what an earlier process was told of."""
        for version in sorted(self.unread.copy()):
            arrived(self.store.objects, arrival(self.tracking, self.alias, version, self.recipe))
            self.unread.discard(version)
        for record in pending(self.store.objects, self.recipe, ALIAS_MOVED):
            if (record.payload.get("model"), record.payload.get("alias")) == (self.alias.model, self.alias.name):
                announce(self.store, record, self.say, confirm_s=CONFIRM_S)

    def keep_on(self, stop: threading.Event, every_s: float) -> None:
        """Make good now and again and again, until told to stop."""
        told = ""
        while not stop.is_set():
            try:
                self.make_good()
                told = ""
            except (StageError, OSError, ValueError) as error:  # whatever it is, the next minute may be better
                if told != str(error):
                    self.say(f"not everything is announced yet, and it is tried each minute: {error}")
                told = str(error)
            stop.wait(every_s)

    @asynccontextmanager
    async def beside(self, every_s: float) -> AsyncIterator[None]:
        """Make good beside what else goes on, in a thread that ends with it or with the process."""
        stop = threading.Event()
        work = (self.keep_on, stop, every_s)
        threading.Thread(target=copy_context().run, args=work, name="announcer", daemon=True).start()
        try:
            yield
        finally:
            stop.set()


def application(announcer: Announcer, secret: str, *, every_s: float = AGAIN_S) -> FastAPI:
    """The web application: POST / takes webhooks, GET /health says that it is there."""
    app = FastAPI(
        title="Enginery's webhooks",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lambda _: announcer.beside(every_s),
    )
    deliveries, alias, say = Deliveries(), announcer.alias, announcer.say

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/")
    async def receive(request: Request) -> dict[str, str]:
        body = await _read(request)
        delivery = verified(secret, request.headers, body, time.time())
        version = _moved(body, alias)
        if not deliveries.take(delivery, time.time()):
            raise HTTPException(409, "this delivery was taken already")
        if version is None:
            return {"status": "nothing to do"}
        try:
            confirmed = await run_in_threadpool(announcer.moved, version)
        except Unavailable as error:
            deliveries.give_back(delivery)
            say(f"version {version} of {alias.uri} was not announced: {error}")
            raise HTTPException(503, error.what) from error
        except StageError as error:
            say(f"version {version} of {alias.uri} was not announced: {error}")
            raise HTTPException(422, error.what) from error
        if not confirmed:
            deliveries.give_back(delivery)
            raise HTTPException(503, "the event is sent, and Prefect's server does not have it on record yet")
        return {"status": "announced"}

    return app


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where webhooks are listened for, and the PEM files that prove it."""

    host: str
    port: int
    cert: Path
    key: Path


def serve(
    uri: str,
    recipe: Recipe,
    settings: Settings,
    address: Address,
    say: Callable[[str], None],
) -> None:
    """Listen until told to stop.

    Raises:
        StageError: there is no Prefect server, secret or certificate, or the port is taken.
    """
    alias, secret = parse(uri, recipe), os.environ.get(SECRET, "")
    if not has_server():
        raise StageError(
            "webhooks are announced on a Prefect server, and none is named",
            remedy="Set PREFECT_API_URL, or use `enginery watch`, which runs the recipe itself.",
        )
    if len(secret) < SHORTEST_SECRET:
        raise StageError(
            f"${SECRET} is {'too short' if secret else 'not set'}",
            measured=f"{len(secret)} characters",
            limit=f"{SHORTEST_SECRET} characters",
            remedy="Set the secret that the webhook was created with.",
        )
    _check_certificate(address.cert, address.key)
    store = settings.connect()
    app = application(Announcer(alias, recipe.name, store, open_tracking(store.scratch), say), secret)
    try:
        listening = socket.create_server((address.host, address.port))
    except OSError as error:
        raise StageError(
            f"port {address.port} of {address.host} cannot be listened on ({error.strerror})",
            remedy="Name another with --port.",
        ) from error
    config = uvicorn.Config(
        app,
        ssl_certfile=str(address.cert),
        ssl_keyfile=str(address.key),
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,  # less than a command may take to end
    )
    say(f"listening on https://{address.host}:{listening.getsockname()[1]}/ for {alias.uri}, recipe {recipe.name}")
    uvicorn.Server(config).run(sockets=[listening])


def _check_certificate(cert: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise StageError(
            f"{cert} and {key} are no certificate with its key ({error})", remedy="Give both as PEM files."
        ) from error


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BYTES:
            raise HTTPException(413, "a webhook is not that large")
    return bytes(body)


def _moved(body: bytes, alias: Alias) -> str | None:
    """The version that a webhook says the alias was put on, None for any other webhook."""
    try:
        said: Any = json.loads(body)
        data = said["data"]
        kind = (said["entity"], said["action"], data.get("name"), data.get("alias"))
        version = str(data.get("version", ""))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HTTPException(400, "this is no webhook of MLflow's") from error
    if kind != ("model_version_alias", "created", alias.model, alias.name):
        return None
    return version
