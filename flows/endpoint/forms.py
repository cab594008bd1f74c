"""Answers in the forms of OpenAI's two endpoints, whole and in chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from stages.serving.writing import Answer

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """How the answers to one request are written.

    Attributes:
        model: as clients call it.
        talks: it is a conversation.
        usage: chunks have a place for the number of tokens, which the last one fills.
    """

    model: str
    talks: bool
    usage: bool = False
    made: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid4().hex)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers at once."""
        kind = "chat.completion" if self.talks else "text_completion"
        choices = [self._whole(at, one) for at, one in enumerate(answers)]
        return self._head(kind) | {"choices": choices, "usage": counted(answers)}

    def begun(self) -> list[str]:
        """What comes before a stream's first piece."""
        return [self._chunk(0, {"delta": {"role": "assistant", "content": ""}})] if self.talks else []

    def piece(self, at: int, text: str) -> str:
        """A piece of an answer."""
        return self._chunk(at, {"delta": {"content": text}} if self.talks else {"text": text})

    def ended(self, at: int, answer: Answer) -> str:
        """The end of an answer whose pieces were sent."""
        return self._chunk(at, {"delta": {}} if self.talks else {"text": ""}, answer.finish)

    def spent(self, answers: Sequence[Answer]) -> str:
        """The number of tokens, behind all answers."""
        return event(self._head(self._chunks) | {"choices": [], "usage": counted(answers)})

    def _whole(self, at: int, one: Answer) -> dict[str, Any]:
        said = {"role": "assistant", "content": one.text, "refusal": None}
        told: dict[str, Any] = {"message": said} if self.talks else {"text": one.text}
        return {"index": at, **told, "logprobs": None, "finish_reason": one.finish}

    def _chunk(self, at: int, told: Mapping[str, Any], finish: str | None = None) -> str:
        choice = {"index": at, **told, "logprobs": None, "finish_reason": finish}
        return event(self._head(self._chunks) | {"choices": [choice]} | ({"usage": None} if self.usage else {}))

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self.talks else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.talks else 'cmpl'}-{self.name}"
        return {"id": name, "object": kind, "created": self.made, "model": self.model}


def counted(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens that were read and written."""
    read, written = sum(one.prompt_tokens for one in answers), sum(one.new_tokens for one in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(said: Mapping[str, Any]) -> str:
    """A server-sent event; JSON in ASCII has no line of its own."""
    return f"data: {json.dumps(said)}\n\n"
