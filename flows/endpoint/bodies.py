"""What a client asks for by OpenAI's parameters, read strictly: whatever would not be followed is refused."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.endpoint.refusals import Refusal
from stages.runtime.contract import StageError
from stages.serving.generation import Generation, generation
from stages.serving.inputs import Prompt

COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024
"""New tokens where a client does not say how many: OpenAI's own number, and where OpenAI has no end, this one."""
_NEW = "max_new_tokens"
_DRAWN = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
"""Parameters that are called as `stages.serving.generation.Generation` calls them; two of them OpenAI does not have."""
NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""What clients note for themselves."""
_BOTH: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
"""Parameters that nothing here follows, and the values that ask for nothing."""
_COMPLETION = _BOTH | {"best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": ()}
_CHAT = _BOTH | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "prediction": (),
    "web_search_options": (),
    "audio": (),
    "store": (False,),
}


@dataclass(frozen=True, kw_only=True)
class Body:
    """What is asked.

    Attributes:
        prompts: texts, tokens or a conversation.
        how: they are continued.
        streams: answers are sent in pieces.
        usage: a stream ends by saying how many tokens there were.
    """

    prompts: Sequence[Prompt]
    how: Generation
    streams: bool
    usage: bool


def fields(data: bytes) -> dict[str, Any]:
    """The parameters of a request.

    Raises:
        Refusal: it is no JSON object.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise Refusal(f"the body is no JSON object, but {type(found).__name__}")
    return found


def completion(said: Mapping[str, Any], maximum_tokens: int) -> Body:
    """What is asked at /v1/completions of a model that reads so many tokens.

    Raises:
        Refusal: a parameter is unknown, out of range or not followed.
    """
    _check(said, ("prompt", "max_tokens"), _COMPLETION)
    how = _how(said, ("max_tokens",), COMPLETION_TOKENS, maximum_tokens)
    return Body(prompts=_prompts(said.get("prompt")), how=how, **_stream(said))


def chat(said: Mapping[str, Any], maximum_tokens: int) -> Body:
    """What is asked at /v1/chat/completions; see `completion`."""
    limits = ("max_completion_tokens", "max_tokens")
    _check(said, ("messages", *limits), _CHAT)
    how = _how(said, limits, CHAT_TOKENS, maximum_tokens)
    messages = said.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages are no list with at least one message", param="messages")
    return Body(prompts=[[_message(one) for one in messages]], how=how, **_stream(said))


def check_names(said: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise Refusal where a parameter is unknown."""
    for name in said:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            remedy = f"Perhaps {near[0]} is meant." if near else "Leave it out."
            raise Refusal(f"there is no parameter {name!r}. {remedy}", param=name, code="unknown_parameter")


def _check(said: Mapping[str, Any], own: tuple[str, ...], unfollowed: Mapping[str, tuple[Any, ...]]) -> None:
    known = {"model", *own, "stream", "stream_options", *_DRAWN, *NOTES, *unfollowed}
    check_names(said, known)
    for name, idle in unfollowed.items():
        value = said.get(name)
        if value is not None and not any(_same(value, one) for one in idle):
            limit = " or ".join(json.dumps(one) for one in (*idle, None))
            text = f"{name} is not followed here; measured {value!r:.200}; limit {limit}. Leave it out."
            raise Refusal(text, param=name, code="unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _how(said: Mapping[str, Any], limits: tuple[str, ...], default: int, maximum_tokens: int) -> Generation:
    given = {name: said[name] for name in _DRAWN if said.get(name) is not None}
    if isinstance(given.get("seed"), int) and -(2**63) <= given["seed"] < 0:
        given["seed"] += 2**64  # OpenAI's have a sign
    for name, value in given.items():
        _held(name, {name: value}, maximum_tokens)
    asked = {name: said[name] for name in limits if said.get(name) is not None}
    for name, value in asked.items():
        _held(name, {_NEW: value}, maximum_tokens)
    if len(set(asked.values())) > 1:
        raise Refusal(f"{' and '.join(asked)} differ", param=next(iter(asked)))
    most = next(iter(asked.values()), min(default, maximum_tokens))
    return generation({**given, _NEW: most})


def _held(name: str, given: Mapping[str, Any], maximum_tokens: int) -> None:
    try:
        generation(given).most(maximum_tokens)
    except StageError as error:
        raise Refusal(str(error).replace(_NEW, name), param=name) from error


def _stream(said: Mapping[str, Any]) -> dict[str, bool]:
    streams, options = said.get("stream"), said.get("stream_options")
    if streams is not None and not isinstance(streams, bool):
        raise Refusal("stream is neither true nor false", param="stream")
    if options is None:
        return {"streams": bool(streams), "usage": False}
    if not streams or not isinstance(options, dict):
        raise Refusal("stream_options is no object, or goes without a stream", param="stream_options")
    idle = {"include_usage": (True, False), "include_obfuscation": (False,)}
    for name, value in options.items():
        if name not in idle or not (value is None or any(_same(value, one) for one in idle[name])):
            raise Refusal(
                f"stream_options.{name} is not followed here; measured {value!r:.200}", param="stream_options"
            )
    return {"streams": True, "usage": bool(options.get("include_usage"))}


def _prompts(prompt: Any) -> Sequence[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if _tokens(prompt):
            return [prompt]
        if all(isinstance(one, list) and _tokens(one) for one in prompt):
            return prompt
    raise Refusal("prompt is no text, no list of texts, no tokens and no list of tokens, or empty", param="prompt")


def _tokens(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _message(message: Any) -> Any:
    """A message whose content is one text, where it came in parts."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(f"a part of a message is no text; measured {part!r:.200}", param="messages")
    return {**message, "content": "".join(part["text"] for part in content)}
