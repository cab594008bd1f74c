"""What comes from outside, in whatever shape a server or a program hands it over, becomes prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stages.runtime.contract import StageError
from stages.serving.chat import Chat, Message

Prompt = str | Sequence[Message] | Sequence[int]
"""A text or tokens, continued as they stand, or a conversation that is answered by the model's chat template."""
PROMPT, MESSAGES = "prompt", "messages"
_SHAPES = 'Give texts, {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}.'


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        prompts: texts, or conversations.
        talks: they are conversations.
        alone: it is one conversation, and no list of them.
        given: parameters that came with it.
    """

    prompts: Sequence[str | Sequence[Message]]
    talks: bool = False
    alone: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)


def question(asked: Any) -> Question:
    """What is asked by texts, by conversations, or by dictionaries with `prompt` or `messages`: one or a list.

    Raises:
        StageError: it is none of these.
    """
    asked = _plain(asked)
    if isinstance(asked, str):
        return Question([asked])
    if isinstance(asked, dict):
        return _fields(asked)
    if not isinstance(asked, list):
        raise _strange(asked)
    if asked and all(isinstance(one, dict) and "role" not in one for one in asked):
        return _joined([_fields(one) for one in asked])
    if asked and all(isinstance(one, dict) for one in asked):
        return Question([asked], talks=True, alone=True)
    if asked and all(isinstance(one, list) for one in asked):
        return Question(asked, talks=True)
    for one in asked:
        if not isinstance(one, str):
            raise _strange(one)
    return Question(asked)


def require_rows(ids_NT: NDArray[np.int64]) -> None:
    """Raise StageError unless these are sequences of tokens of one length."""
    if ids_NT.ndim != 2 or not ids_NT.size or ids_NT.min() < 0:
        raise StageError(
            "these are no sequences of tokens",
            measured=f"shape {ids_NT.shape}, from {ids_NT.min() if ids_NT.size else 'none'}",
            limit="[sequences, tokens], at least one of each, from 0 on",
            remedy="Give whole sequences of one length, as the tokenizer has them.",
        )


def encoded(tokenizer: Tokenizer, talks: Chat | None, prompt: Prompt) -> list[int]:
    """A prompt's tokens.

    Raises:
        StageError: it is no prompt, or there is no chat template for a conversation.
    """
    if isinstance(prompt, str):
        # A tokenizer may put a token before every text, of which there is none here.
        return _tokens(tokenizer, prompt) if prompt else []
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise StageError(
            "a prompt is neither text nor tokens nor a conversation",
            measured=f"{type(prompt).__name__} {prompt!r:.60}",
            limit="str, a list of token numbers, or a list of messages",
            remedy="Turn it into text.",
        )
    if prompt and isinstance(prompt[0], int):
        return _known(tokenizer, cast(Sequence[int], prompt))
    if talks is None:
        raise StageError(
            "the model has no chat template",
            measured="none beside its tokenizer",
            limit="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="Ask it by a prompt, or give its checkpoint a chat template and make it again.",
        )
    # The template has written all special tokens there are to be.
    return _tokens(tokenizer, talks.prompt(cast(Sequence[Message], prompt)), add_special_tokens=False)


def _known(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    most = tokenizer.get_vocab_size()
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < most:
            raise StageError(
                "there is no such token", measured=one, limit=f"0 to {most - 1}", remedy="Give text instead."
            )
    return [*ids]


def _tokens(tokenizer: Tokenizer, text: str, **how: bool) -> list[int]:
    require_utf8(text, "a prompt")
    ids: list[int] = tokenizer.encode(text, **how).ids
    return ids


def require_text(text: Any, what: str = "a text") -> None:
    """Raise StageError where something is no text, is empty, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise StageError(f"{what} is no text", measured=repr(text)[:200], limit="a text", remedy="Give a text.")
    require_utf8(text, what)
    if not text.strip():
        raise StageError(
            f"{what} is empty", measured=repr(text)[:200], limit="at least one character", remedy="Leave it out."
        )


def require_utf8(text: str, what: str) -> None:
    """Raise StageError where a text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StageError(
            f"{what} is no text",
            measured=f"{text[error.start : error.end]!r} at character {error.start}",
            limit="what UTF-8 can write",
            remedy="Leave it out.",
        ) from error


def _fields(asked: dict[str, Any]) -> Question:
    if "role" in asked:
        return Question([[asked]], talks=True, alone=True)
    if (PROMPT in asked) == (MESSAGES in asked):
        raise StageError(
            "neither a prompt nor messages are given, or both", measured=", ".join(map(str, asked)), remedy=_SHAPES
        )
    given = {name: value for name, value in asked.items() if name not in (PROMPT, MESSAGES)}
    if PROMPT in asked:
        texts = question(asked[PROMPT])
        if texts.talks:
            raise _strange(asked[PROMPT])
        return Question(texts.prompts, given=given)
    messages = asked[MESSAGES]
    if not isinstance(messages, list):
        raise _strange(messages)
    several = bool(messages) and all(isinstance(one, list) for one in messages)
    return Question(messages if several else [messages], talks=True, alone=not several, given=given)


def _joined(some: list[Question]) -> Question:
    if len({one.talks for one in some}) > 1:
        raise StageError("prompts and messages are asked at once", limit="one of both", remedy=_SHAPES)
    if any(one.given != some[0].given for one in some):
        raise StageError(
            "parameters differ among what is asked at once", limit="the same for all", remedy="Ask one after the other."
        )
    return Question([prompt for one in some for prompt in one.prompts], some[0].talks, given=some[0].given)


def _plain(value: Any) -> Any:
    """Without numpy's arrays and scalars, into which a server turns what was JSON."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _strange(value: Any) -> StageError:
    return StageError("what is asked is no text and no conversation", measured=repr(value)[:200], remedy=_SHAPES)
