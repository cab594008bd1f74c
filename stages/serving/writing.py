"""New tokens become text while they come: what is given out is never taken back, and ends before a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: what it said.
        finish: `stop` where the model or a stop string ended it, `length` where it had no more room.
        prompt_tokens: tokens that it read.
        new_tokens: tokens that it said.
    """

    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int


class Writing:
    """The text of one answer.

    Attributes:
        stopped: a stop string was said.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._given = 0
        special = tokenizer.get_added_tokens_decoder() if stop else {}
        # Text has no special tokens in it: one that is a stop string is looked for among the tokens.
        self._tokens = {token for token, one in special.items() if one.special and one.content in stop}

    def text(self, tokens: Sequence[int]) -> str:
        """All of it, once no token follows."""
        return self._cut(self.tokenizer.decode([*tokens], skip_special_tokens=True))

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string has been said; there is a token."""
        self._cut(self._settled(tokens))
        self.stopped = self.stopped or tokens[-1] in self._tokens
        return self.stopped

    def piece(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """What no later token changes, and was not given out yet.

        Args:
            tokens: all new ones so far.
            last: no token follows.
        """
        text = self.text(tokens) if last else self._cut(self._settled(tokens))
        upto = len(text) if last or self.stopped else len(text) - _begun(text, self.stop)
        piece = text[self._given : upto]
        self._given = max(self._given, upto)
        return piece

    def _cut(self, text: str) -> str:
        at = min((place for one in self.stop if (place := text.find(one)) >= 0), default=None)
        self.stopped = self.stopped or at is not None
        return text[:at]

    def _settled(self, tokens: Sequence[int]) -> str:
        # A run of single bytes is decoded as a whole: one more may turn what was a character into none.
        upto = len(tokens)
        while upto and _BYTE.fullmatch(self.tokenizer.id_to_token(tokens[upto - 1]) or ""):
            upto -= 1
        text: str = self.tokenizer.decode([*tokens[:upto]], skip_special_tokens=True)
        return text.rstrip(_BROKEN)  # bytes of a character whose others are still to come


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """Characters at a text's end that may be the beginning of a stop string."""
    longest = max((len(one) for one in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in stop):
            return length
    return 0
