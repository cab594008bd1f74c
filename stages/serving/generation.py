"""How a text is to be continued: what may be asked for, and within which limits."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from stages.runtime.contract import StageError

NEW_TOKENS = 32
"""New tokens of a text where nobody says how many."""
STOPS, STOP_CHARACTERS = 16, 1000
"""At most so many stop strings, of at most so many characters: each is looked for after each token."""
PENALTIES = 0.01, 100.0
"""Beyond them logits would leave what 32 bits hold, and no token had a probability."""
MOST_BEAMS = 64
"""Each takes a row of its own, and the memory of one."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is asked of a model that continues a text; the defaults take the likeliest token each time.

    Attributes:
        max_new_tokens: at most so many new tokens; None for 32, or what the model reads where that is less.
        temperature: of the distribution that tokens are drawn from; 0 takes the likeliest.
        top_k: tokens are drawn from the likeliest so many; 0 for all.
        top_p: tokens are drawn from the likeliest that together have this probability.
        repetition_penalty: above 1, tokens that the prompt or the answer has already are less likely; None for what the
            settings say, or else 1.
        stop: the answer ends before the first of these texts.
        seed: the same one draws the same tokens, whatever else is asked beside; None draws anew each time.
        beams: beginnings of an answer that are followed at once, see `stages.serving.beams`; None for what the
            settings of an encoder-decoder say where nothing is drawn, else for 1.

    Raises:
        StageError: a value is out of range, or several beams are to be drawn.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    beams: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _whole("max_new_tokens", self.max_new_tokens, 1)
        _real("temperature", self.temperature, "a number from 0 on", self.temperature >= 0)
        _whole("top_k", self.top_k, 0)
        _real("top_p", self.top_p, "a number above 0, at most 1", 0 < self.top_p <= 1)
        least, most = PENALTIES
        if self.repetition_penalty is not None:
            held = least <= self.repetition_penalty <= most
            _real("repetition_penalty", self.repetition_penalty, f"a number from {least} to {most}", held)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
        if self.beams is not None:
            _check_beams(self.beams, self.temperature)
        long = [one for one in self.stop if not 0 < len(one) <= STOP_CHARACTERS]
        if long or len(self.stop) > STOPS:
            raise StageError(
                "stop strings are out of range",
                measured=f"one of {len(long[0])} characters" if long else f"{len(self.stop)} of them",
                limit=f"{STOPS} of 1 to {STOP_CHARACTERS} characters",
                remedy="Give fewer, or others.",
            )

    def most(self, maximum_tokens: int) -> int:
        """New tokens that are wanted of a model that reads sequences up to `maximum_tokens`.

        Raises:
            StageError: more than such a sequence.
        """
        if self.max_new_tokens is None:
            return min(NEW_TOKENS, maximum_tokens)
        if self.max_new_tokens > maximum_tokens:
            raise StageError(
                "max_new_tokens is more than the model reads",
                measured=self.max_new_tokens,
                limit=f"{maximum_tokens} tokens, prompt and answer together",
                remedy="Ask for fewer.",
            )
        return self.max_new_tokens


PARAMETERS = tuple(field.name for field in fields(Generation))
"""What may be asked for, by name."""


def generation(given: Mapping[str, Any]) -> Generation:
    """What is asked for by names and values that come from outside; a value of None stands for the default.

    Raises:
        StageError: a name that is none of PARAMETERS, a value of another type or out of range.
    """
    for name in given:
        if name not in PARAMETERS:
            near = difflib.get_close_matches(str(name), PARAMETERS, 1)
            raise StageError(
                f"there is no parameter {name!r}",
                limit=", ".join(PARAMETERS),
                remedy=f"Perhaps {near[0]} is meant." if near else "Leave it out.",
            )
    asked = {name: value for name, value in given.items() if value is not None}
    if "stop" in asked:
        asked["stop"] = _texts(asked["stop"])
    for name in ("max_new_tokens", "top_k", "seed", "beams"):
        if name in asked:
            asked[name] = _integer(name, asked[name])
    for name in ("temperature", "top_p", "repetition_penalty"):
        if name in asked:
            asked[name] = _number(name, asked[name])
    return Generation(**asked)


def _whole(name: str, value: int, least: int) -> None:
    if value < least:
        raise StageError(f"{name} is out of range", measured=value, limit=f"at least {least}", remedy="Give another.")


def _check_beams(beams: int, temperature: float) -> None:
    if not 1 <= beams <= MOST_BEAMS:
        limit = f"1 to {MOST_BEAMS}"
        raise StageError("beams is out of range", measured=beams, limit=limit, remedy="Give another.")
    if beams > 1 and temperature > 0:
        raise StageError(
            "beams are not drawn",
            measured=f"{beams} beams at temperature {temperature}",
            limit="temperature 0, or 1 beam",
            remedy="Leave out one of both.",
        )


def _real(name: str, value: float, limit: str, holds: bool) -> None:
    if not (holds and math.isfinite(value)):
        raise StageError(f"{name} is out of range", measured=value, limit=limit, remedy="Give another.")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, Real) and not isinstance(value, Integral) and float(value).is_integer():
        value = int(float(value))  # JSON may write 4 as 4.0
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise StageError(f"{name} is no whole number", measured=repr(value), limit="a whole number")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise StageError(f"{name} is no number", measured=repr(value), limit="a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _texts(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(found, list | tuple) or any(not isinstance(one, str) for one in found):
        raise StageError("stop is no text", measured=repr(value), limit="a text, or a list of texts")
    return tuple(found)
