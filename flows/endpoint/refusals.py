"""What is refused is said in OpenAI's form of an error, which its clients turn into exceptions of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from stages.runtime.contract import StageError
from stages.serving.batching import Closed, Full

RETRY_AFTER_S = 1
"""When a client that was turned away may ask again: a row is free within the answers that are being written."""
_CLIENT, _BUSY, _SERVER = "invalid_request_error", "rate_limit_error", "server_error"


class Refusal(Exception):
    """Why a request is not answered.

    Args:
        message: what is wrong.
        param: the parameter that is meant.
        code: as OpenAI calls what is wrong.
        status: of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        self.message, self.param, self.code, self.status = message, param, code, status
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _BUSY if self.status == 429 else _SERVER if self.status >= 500 else _CLIENT
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """What is sent."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        return answer(self.body(), self.status, headers)


def broken(error: Exception) -> Refusal:
    """Why a prompt that had been taken was not answered."""
    if isinstance(error, Full):
        return Refusal(str(error), code="rate_limit_exceeded", status=429)
    if isinstance(error, Closed):
        return Refusal(str(error), status=503)
    if isinstance(error, StageError):
        return Refusal(str(error), status=500)
    return Refusal(f"the engine broke: {type(error).__name__}: {error}", status=500)


def answer(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON object, in ASCII: what is echoed may hold what UTF-8 cannot write."""
    return Response(json.dumps(body), status, headers, "application/json")
