"""The web application: OpenAI's endpoints over one batch, and what tells how it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flows.endpoint.bodies import Body, chat, completion, fields
from flows.endpoint.forms import DONE, Form, event
from flows.endpoint.metrics import EMBEDDED, GONE, REFUSED, TURNED_AWAY, Metrics
from flows.endpoint.refusals import Refusal, answer, broken
from flows.endpoint.vectors import Vectors, wanted
from stages.runtime.contract import StageError
from stages.serving.asked import Asked, Heard
from stages.serving.batching import Batching, Closed, Full
from stages.serving.writing import Answer

LARGEST_BYTES = 16 << 20
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models", "/health", "/metrics")
_TOLD = ["GET", "HEAD"]
"""Who only looks whether it is there asks for the head."""
Read = Callable[[dict[str, Any], int], Body]


class Hearing:
    """What an event loop hears of prompts that another thread answers."""

    def __init__(self) -> None:
        self._loop, self._heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Heard]]()

    def __call__(self, at: int, heard: Heard) -> None:
        """Called by the other thread."""
        self._loop.call_soon_threadsafe(self._heard.put_nowait, (at, heard))

    async def next(self) -> tuple[int, str | Answer]:
        """What comes next, of any of them.

        Raises:
            Refusal: one was not answered.
        """
        at, heard = await self._heard.get()
        if isinstance(heard, Exception):
            raise broken(heard)
        return at, heard

    async def answers(self, count: int) -> list[Answer]:
        """All of them, whole."""
        found: dict[int, Answer] = {}
        while len(found) < count:
            at, heard = await self.next()
            if isinstance(heard, Answer):
                found[at] = heard
        return [found[at] for at in range(count)]

    async def events(self, form: Form, count: int) -> AsyncIterator[str]:
        """Their pieces as they come."""
        answers: list[Answer] = []
        for one in form.begun():
            yield one
        while len(answers) < count:
            try:
                at, heard = await self.next()
            except Refusal as error:
                yield event(error.body())
                return
            if isinstance(heard, str):
                yield form.piece(at, heard)
            else:
                answers.append(heard)
                yield form.ended(at, heard)
        if form.usage:
            yield form.spent(answers)
        yield DONE


class Streamed(StreamingResponse):
    """Frees the rows of a client that has gone, also of one that went before anything was sent."""

    def __init__(self, events: AsyncIterator[str], asked: Sequence[Asked]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for one in self.asked:
                one.leave()


@dataclass(frozen=True)
class Endpoint:
    """One model, and what answers for it.

    Attributes:
        name: as clients call it.
        vectors: what answers for a model that gives vectors of texts; None for another.
    """

    name: str
    batching: Batching
    metrics: Metrics
    vectors: Vectors | None = None

    async def answered(self, request: Request, read: Read, *, talks: bool) -> Response:
        """The answer to a request.

        Raises:
            Refusal: there is none.
        """
        said = fields(await _bytes(request))
        self.check(said.get("model"))
        body, hearing = read(said, self.batching.model.maximum_tokens), Hearing()
        form = Form(self.name, talks, body.usage)
        try:
            asked = await run_in_threadpool(self.batching.ask, body.prompts, body.how, hearing, pieces=body.streams)
        except (Full, Closed) as error:
            raise broken(error) from error
        except StageError as error:
            raise Refusal(str(error), param="messages" if talks else "prompt") from error
        if body.streams:
            return Streamed(hearing.events(form, len(asked)), asked)
        return await self._whole(request, form, hearing, asked)

    async def embedded(self, request: Request, vectors: Vectors, said: dict[str, Any]) -> Response:
        """Vectors of texts.

        Raises:
            Refusal: there are none.
        """
        found = asyncio.ensure_future(vectors.answered(wanted(said), self.name))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({found, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                self.metrics.ended(GONE)
                return Response(status_code=499)
            body = found.result()
        finally:
            for task in (found, gone):
                task.cancel()
        self.metrics.read(body["usage"]["prompt_tokens"])
        self.metrics.ended(EMBEDDED)
        return answer(body)

    def check(self, model: Any) -> None:
        """Raise Refusal unless this model is asked."""
        if not isinstance(model, str):
            raise Refusal(f"no model is named; there is {self.name!r}", param="model")
        if model != self.name:
            text = f"there is no model {model!r}; there is {self.name!r}"
            raise Refusal(text, param="model", code="model_not_found", status=404)

    async def _whole(self, request: Request, form: Form, hearing: Hearing, asked: Sequence[Asked]) -> Response:
        answers = asyncio.ensure_future(hearing.answers(len(asked)))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
            return answer(form.whole(answers.result())) if answers.done() else Response(status_code=499)
        finally:
            for one in asked:
                one.leave()
            for task in (answers, gone):
                task.cancel()


def application(endpoint: Endpoint) -> FastAPI:
    """OpenAI's endpoints; GET /health and /metrics say how it is."""
    app = FastAPI(title="Enginery", docs_url=None, redoc_url=None, openapi_url=None)
    _tell(app, endpoint)
    _refuse(app, endpoint.metrics)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await endpoint.answered(request, completion, talks=False)

    @app.post("/v1/chat/completions")
    async def conversations(request: Request) -> Response:
        return await endpoint.answered(request, chat, talks=True)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        said = fields(await _bytes(request))
        endpoint.check(said.get("model"))
        if endpoint.vectors is None:
            task = endpoint.batching.model.task
            text = f"the model gives no vectors of texts; measured its task is {task}; limit embed"
            raise Refusal(text, param="model")
        return await endpoint.embedded(request, endpoint.vectors, said)

    return app


def _tell(app: FastAPI, endpoint: Endpoint) -> None:
    """What is asked for without a body."""
    batching, began = endpoint.batching, int(time.time())
    card = {"id": endpoint.name, "object": "model", "created": began, "owned_by": "enginery"}

    @app.api_route("/health", methods=_TOLD)
    async def health() -> Response:
        said: dict[str, Any] = {"status": "stopping" if batching.closed else "ok", "model": endpoint.name}
        said |= {"active": batching.active, "waiting": batching.waiting}
        if endpoint.vectors is not None:
            said |= {"active": endpoint.vectors.active, "waiting": endpoint.vectors.waiting}
        return answer(said, 503 if batching.closed else 200)

    @app.api_route("/metrics", methods=_TOLD)
    async def measured() -> Response:
        return Response(endpoint.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/v1/models", methods=_TOLD)
    async def models() -> Response:
        return answer({"object": "list", "data": [card]})

    @app.api_route("/v1/models/{name:path}", methods=_TOLD)
    async def model(name: str) -> Response:
        endpoint.check(name)
        return answer(card)


def _refuse(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        if error.status < 500:
            metrics.ended(TURNED_AWAY if error.status == 429 else REFUSED)
        return error.response()

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: Exception) -> Response:
        metrics.ended(GONE)
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        path, allowed = request.url.path, error.headers or {}
        text = error.detail
        if error.status_code == 404:
            text = f"there is no {path:.200}; there are {', '.join(PATHS)}"
        elif error.status_code == 405:
            text = f"{request.method:.20} is not answered at {path:.200}; limit {allowed.get('Allow')}"
        told = Refusal(text, status=error.status_code).response()
        told.headers.update(allowed)
        return told

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        return broken(error).response()


async def _bytes(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BYTES:
            raise Refusal(f"the body is too large; limit {LARGEST_BYTES} bytes", status=413)
    return bytes(body)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
