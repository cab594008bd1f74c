"""What a row of a data set says: its text, or the conversation that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.runtime.contract import StageError
from stages.runtime.encodings import in_lf

TEXT = "text"
"""The column that is read where none is asked for; where a row has none, a conversation is looked for."""
CHATS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
"""Columns of a question and its answer; `input` goes after an `instruction`."""
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
_SHOWN = 8


@dataclass(frozen=True)
class Message:
    """What one role says."""

    role: str
    content: str


Content = str | tuple[Message, ...] | None
"""A row's text, its conversation, or None where it is null."""


def content_of(row: Any, column: str, where: str) -> Content:
    """A row's text or conversation.

    Raises:
        StageError: it has none, or one with characters that no text holds.
    """
    if row is None:
        return None
    if not isinstance(row, dict):
        raise no_text(f"{where} has no text in {column!r}", [("", _kind(row), False)])
    present, value = reached(row, column)
    if present:
        return _of_value(value, column, row, where)
    if column == TEXT:
        for name in CHATS:
            if name in row and (row[name] is None or _is_chat(row[name]) or row[name] == []):
                return _of_value(row[name], name, row, where)
        if pair := pair_of(row):
            return _of_pair(row, pair, where)
    raise no_text(f"{where} has no text in {column!r}", _fields(row))


def reached(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether there is such a field, and its value; a dotted name is a path unless a field bears it."""
    if column in row:
        return True, row[column]
    first, dot, rest = column.partition(".")
    if not dot or first not in row:
        return False, None
    if row[first] is None:
        return True, None
    return reached(row[first], rest) if isinstance(row[first], dict) else (False, None)


def reads(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has text or a conversation there."""
    present, value = reached(row, column)
    return present and _kind(value) in ("string", "list of strings", "conversation")


def _of_value(value: Any, column: str, row: Mapping[str, Any], where: str) -> Content:
    if value is None or value != value:  # NaN is how pandas writes what is missing
        return None
    if isinstance(value, str):
        return _sound(value, column, where)
    if isinstance(value, list) and all(part is None or isinstance(part, str) for part in value):
        return None if None in value else _sound("\n\n".join(value), column, where)
    if _is_chat(value):
        return _chat(value, column, where)
    raise no_text(f"{where} has no text in {column!r}", _fields(row))


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and ("role" in part or "from" in part) for part in value)
    )


def _chat(value: Sequence[Mapping[str, Any]], column: str, where: str) -> tuple[Message, ...] | None:
    """A conversation in the roles of chat templates; None where a message's content is null."""
    made = []
    for number, part in enumerate(value, 1):
        at = f"message {number} of {column}"
        role = part["role"] if "role" in part else part["from"]
        content = _said(part.get("content", part.get("value")), at, where)
        if content is None and part.get("tool_calls"):
            content = ""  # what it says is the call
        if content is None:
            return None
        if not isinstance(role, str):
            raise StageError(f"{where}: {at} has no role", measured=_kind(role), remedy="Give each message its role.")
        made.append(Message(_ROLES.get(role.lower(), role), _sound(content, at, where)))
    return tuple(made)


def _said(content: Any, at: str, where: str) -> str | None:
    """A message's content; parts of text come one below the other."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n".join(texts)
    elif content is None or isinstance(content, str):
        return content
    raise StageError(
        f"{where}: {at} is not of text alone",
        measured=_kind(content) if not isinstance(content, list) else f"parts without text among {len(content)}",
        limit="a string, or a list of parts with `text`",
        remedy="Leave images and other parts without text out of the file.",
    )


def pair_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of PAIRS that a row has."""
    return next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)


def _of_pair(row: Mapping[str, Any], pair: tuple[str, str], where: str) -> Content:
    made: list[Message] = []
    for name, role in zip(pair, ("user", "assistant"), strict=True):
        value = _of_value(row[name], name, row, where)
        if value is None:
            return None
        if isinstance(value, str):
            more = _of_value(row.get("input"), "input", row, where) if name == "instruction" else None
            value = (Message(role, f"{value}\n\n{more}" if isinstance(more, str) and more else value),)
        made += value
    return tuple(made)


def _sound(text: str, column: str, where: str) -> str:
    """The text with LF for line ends; refused where it holds what is no character of a text."""
    at = " ".join(where.rsplit(" ", 2)[1:])
    if "\0" in text:
        raise StageError(
            f"{where}: {column} holds a NUL character",
            measured="\\u0000",
            remedy=f"Leave {at} out, or write its text without it: text.replace('\\0', '').",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StageError(
            f"{where}: {column} holds half of a character, a lone surrogate",
            measured=f"\\u{ord(text[error.start]):04x}",
            remedy=f"Leave {at} out, or write its text without it: text.encode('utf-8', 'ignore').decode().",
        ) from error
    return in_lf(text)


def _fields(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str, bool]]:
    """(path, kind, whether it can be read) of a JSON row's fields."""
    found = []
    for name, value in row.items():
        kind = _kind(value)
        found.append((f"{prefix}{name}", kind, reads({"": value}, "")))
        if kind == "object":
            found += _fields(value, f"{prefix}{name}.")
    return found


def _kind(value: Any) -> str:
    if isinstance(value, list):
        if _is_chat(value):
            return "conversation"
        return "list of strings" if value and all(isinstance(part, str) for part in value) else "list"
    kinds = {str: "string", dict: "object", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def no_text(what: str, fields: Sequence[tuple[str, str, bool]]) -> StageError:
    """The error for a column that is not there or holds no text: which there are, and which would do."""
    named = [f"{name} ({kind})" if name else f"a {kind}" for name, kind, _ in fields if kind]
    has = ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")
    fit = [name for name, _, reads in fields if reads]
    one = f"`column` to {fit[0]}" if len(fit) == 1 else f"`column` to one of {', '.join(fit[:_SHOWN])}"
    return StageError(
        what,
        measured=f"it has {has or 'none'}",
        remedy=f"Set the step's parameter {one}." if fit else "Give rows with a column of texts or conversations.",
    )
