"""A conversation becomes a prompt by the chat template that travels with the tokenizer, without transformers.

The same text as transformers' `apply_chat_template` with `add_generation_prompt` makes. A template comes with a
checkpoint from wherever: it is rendered in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.models.checkpoint.json_files import read_json
from stages.runtime.contract import StageError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""`role` and `content`, and what else a template knows."""

_CONFIG, _FILE, _SPECIAL = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Chat:
    """How conversations are written.

    Attributes:
        template: in Jinja.
        tokens: special tokens that it may name, such as `bos_token`.
    """

    template: str
    tokens: Mapping[str, str]

    def prompt(self, messages: Sequence[Message]) -> str:
        """What a model reads that is to say the next message.

        Raises:
            StageError: the messages are none, or the template refuses them.
        """
        from jinja2 import TemplateError

        told = [_checked(one) for one in messages]
        if not told:
            raise StageError("a conversation is empty", limit="at least one message", remedy="Give it a message.")
        try:
            written = _compiled(self.template).render(
                messages=told, tools=None, documents=None, add_generation_prompt=True, **self.tokens
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise StageError(
                "the chat template does not take this conversation",
                measured=f"{type(error).__name__}: {error}",
                remedy="Give messages in the roles and the order that the model knows.",
            ) from error
        return written


def chat(folder: Path) -> Chat | None:
    """How a folder's tokenizer writes conversations; None where it has no chat template.

    Raises:
        StageError: a file of it is damaged.
    """
    config = read_json(folder / _CONFIG, optional=True)
    template = _template(folder, config.get("chat_template"))
    if template is None:
        return None
    beside = read_json(folder / _SPECIAL, optional=True)
    found = {name: config.get(name) or beside.get(name) for name in _TOKENS}
    tokens = {name: one.get("content", "") if isinstance(one, dict) else str(one) for name, one in found.items() if one}
    return Chat(template, tokens)


def _template(folder: Path, told: Any) -> str | None:
    if (folder / _FILE).is_file():
        try:
            return (folder / _FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise StageError(
                f"{_FILE} of {folder.name} is no text",
                measured=f"byte {error.start}",
                limit="UTF-8",
                remedy="Write it in UTF-8.",
            ) from error
    if isinstance(told, list):  # several by name
        named = [one for one in told if isinstance(one, dict) and one.get("name") == "default"]
        told = named[0].get("template") if named else None
    return told if isinstance(told, str) else None


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise StageError(
            "a message has no role", measured=repr(message), remedy='Give each as {"role": "user", "content": "..."}.'
        )
    if not isinstance(message.get("content"), str):
        raise StageError(
            f"the content of a message of {message['role']!r} is no text",
            measured=type(message.get("content")).__name__,
            remedy='Give each as {"role": "user", "content": "..."}.',
        )
    return {name: value for name, value in message.items() if value is not None}


@cache
def _compiled(template: str) -> Template:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Templates may mark what the model says; it is written as it stands."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Names(Namespace):
        """Jinja's own lets a template write names with underscores, and get out of the sandbox by them."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a chat template may not write {name!r}")
            super().__setitem__(name, value)

    def namespace(*given: Any, **named: Any) -> Namespace:
        made = Names()
        for name, value in dict(*given, **named).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": namespace,
    }
    return made.from_string(template)
