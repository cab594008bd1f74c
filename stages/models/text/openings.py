"""How a model's own text begins: as the tokenizer begins one, by a drawn word, as a user begins a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from stages.models.text.text_ends import special_ends
from stages.models.text.token_ids import chat_template
from stages.runtime.contract import StageError

_SPOKEN = "QUESTION"
"""Stands for what a user says where a template is asked what it writes around that."""
_BEGINNERS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Tokens that may stand between texts of what a model learned from, where its tokenizer puts none before a text."""


_FEWEST_WORDS = 100
"""A vocabulary with fewer words than these has none to begin texts with."""
_SHORTEST_WORD = 3


@dataclass(frozen=True)
class Opening:
    """What stands before a text that is still to be written.

    Attributes:
        first: the tokens that it begins with, at least one.
        turn: of a conversation: what stands between the user's words and the answer, otherwise empty.
        words: the tokens of words of which each text begins with one, otherwise empty.
    """

    first: tuple[int, ...]
    turn: tuple[int, ...] = ()
    words: tuple[tuple[int, ...], ...] = ()

    def word(self, seed: int, number: int) -> tuple[int, ...]:
        """The word that the text of this number begins with."""
        if not self.words:
            return ()
        return self.words[int(np.random.default_rng([seed, number, len(self.words)]).integers(len(self.words)))]

    @cached_property
    def longest(self) -> int:
        """Most tokens that stand before what the model writes first."""
        return len(self.first) + max(map(len, self.words), default=0)


def openings(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[Opening]:
    """A text's opening, one with a word of the vocabulary, and one of a conversation.

    The second is there where the vocabulary has words, the third where the tokenizer has a chat template that takes a
    user's words alone. What a model knows of rare things it says when it is begun with one, seldom by itself.

    Source: the drawn beginning is that of Liu et al., LLM-QAT (2023), section 3.1, over words in place of any token.

    Raises:
        StageError: no token begins a text.
    """
    around = _around(tokenizer)
    first, _ = special_ends(tokenizer)
    first = first or [_beginner(tokenizer, config, "".join(around or ()))]
    found = [Opening(tuple(first))]
    if len(words := _words(tokenizer)) >= _FEWEST_WORDS:
        found.append(Opening(tuple(first), words=words))
    if around:
        before, after = (
            tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in around
        )
        if before and after:
            found.append(Opening(before, after))
    return found


def ends(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> frozenset[int]:
    """The tokens behind which nothing belongs to a text: every control token is one."""
    own = config.get_text_config().eos_token_id
    said = own if isinstance(own, list | tuple) else [] if own is None else [own]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset({*special, *said, *tokenizer.all_special_ids})


def _words(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Tokens of the words of the vocabulary that texts begin with: capitalized ones, of scripts without case any."""
    special = set(tokenizer.all_special_ids) | tokenizer.added_tokens_decoder.keys()
    said = tokenizer.batch_decode([[token] for token in range(len(tokenizer)) if token not in special])
    words = {one for text in said if _is_word(one := str(text).strip())}
    ids = tokenizer(sorted(words), add_special_tokens=False, verbose=False)["input_ids"] if words else []
    return tuple(tuple(one) for one in ids)


def _is_word(text: str) -> bool:
    if not text.isalpha():
        return False
    cased = text.lower() != text.upper()
    return len(text) >= _SHORTEST_WORD and text[0].isupper() and text[1:].islower() if cased else len(text) > 1


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """What the chat template writes before a user's words, and between them and the answer."""
    template = chat_template(tokenizer)
    if template is None:
        return None
    try:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": _SPOKEN}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError):
        return None  # one that wants a system's words first, or a list of parts
    before, found, after = str(whole).partition(_SPOKEN)
    return (before, after) if found and _SPOKEN not in after else None


def _beginner(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, template: str) -> int:
    """The token before a text of a tokenizer that puts none there: none that the chat template writes, if possible.

    A template's own tokens begin a turn of a conversation, and what would be written behind one is a role's name.
    """
    known = list(_beginners(tokenizer, config))
    for token in known:
        if str(tokenizer.convert_ids_to_tokens(token)) not in template:
            return token
    if not known:
        raise StageError(
            "no token begins a text, so that the model cannot write one by itself",
            measured="neither the tokenizer nor config.json has a bos_token or an eos_token",
            remedy='Set "bos_token_id" in config.json, or give a text in place of model://self.',
        )
    return known[0]


def _beginners(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Iterator[int]:
    text = config.get_text_config()
    for name in _BEGINNERS:
        for owner in (tokenizer, text):
            token = getattr(owner, f"{name}_id", None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int) and 0 <= token < text.vocab_size:
                yield token
