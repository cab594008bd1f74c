"""Token ids of a text and of a conversation, in which control tokens stand only where they are meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.runtime.contract import StageError

_TODAY = date(2024, 7, 26)
"""What templates that write a date are told, the one that Llama's fall back on: windows do not change by the day."""


def spelt_words(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Control token -> the ids of its word's characters, for tokenizers whose vocabulary knows the word as a whole."""
    return {
        token: [found for found in tokenizer.convert_tokens_to_ids(list(added.content)) if found is not None]
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and token != tokenizer.unk_token_id
    }


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, spelt: Mapping[int, Sequence[int]] | None) -> list[int]:
    """The ids of a text without special tokens around it.

    Args:
        tokenizer: the model's.
        text: words in it that look like control tokens are text like any other.
        spelt: see `spelt_words`; None where such words are to be parsed as control tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    unknown = tokenizer.unk_token
    if spelt is None or (spelt.keys().isdisjoint(ids) and not (unknown and str(unknown) in text)):
        return ids
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # Unigram models hold the words of control tokens as pieces, and the likeliest ones.
    return [part for token in ids for part in spelt.get(token, (token,))]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template for conversations, the default one of several; None where it has none."""
    held = tokenizer.chat_template
    template = held.get("default") if isinstance(held, dict) else held
    return _dated(str(template)) if template else None


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Mapping[str, str]],
    name: str,
    *,
    parsed: bool,
) -> list[int]:
    """The ids of a conversation as a chat template writes it, with the template's control tokens.

    Args:
        tokenizer: the model's.
        template: see `chat_template`.
        messages: `role` and `content`.
        name: the conversation's in the corpus, for errors.
        parsed: whether words of the contents that look like control tokens become control tokens, too.

    Raises:
        StageError: the template refuses the conversation, or the tokenizer cannot write such a word as text.
    """
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            sanitize_control_tokens=not parsed,
            return_dict=False,
        )
    except (TemplateError, TypeError) as error:
        raise StageError(
            f"the model's chat template refuses conversation {name} of the corpus: {error}",
            measured=f"roles {', '.join(message['role'] for message in messages)}",
            remedy="Write this row of the corpus's source as the template wants it, or leave it out.",
        ) from error
    except ValueError as error:
        raise StageError(
            f"the tokenizer cannot write conversation {name} of the corpus: {error}",
            remedy="Set the corpus's parameter `control_tokens` to parse, or leave this row of its source out.",
        ) from error
    return ids


def plain_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What is said in a conversation, separated by blank lines."""
    return "\n\n".join(message["content"] for message in messages)


def _dated(template: str) -> str:
    """The template with one day for today."""
    if "strftime_now" not in template:
        return template
    signs = [f"%{sign}" for sign in "YymBbdeHIMSpAaj"] + ["%-d", "%-m"]
    filters = "".join(f"|replace({sign!r}, {_TODAY.strftime(sign)!r})" for sign in signs)
    # The empty print keeps Jinja from taking a line end at the template's beginning for the block's.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"
