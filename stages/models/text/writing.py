"""Text that a decoder writes itself, by temperature and nucleus, many texts side by side over one cache.

Shapes: N texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.algorithms.drawing import drawn_from_nucleus
from stages.models.text.openings import Opening
from stages.runtime.contract import StageError

MOST_TOGETHER = 96
"""Texts written side by side: reading the weights once for each token takes most of the time of a few."""
CACHE_BYTES = 2**29
"""Keys and values of the texts written side by side, at most, where one text has no more."""


@dataclass(frozen=True)
class Manner:
    """How text is drawn.

    Attributes:
        tokens: of a text, with what it begins with, at most.
        temperature: softens the distributions.
        nucleus: share of a distribution that its likeliest tokens make up, of which one is drawn.
        seed: with a text's number, of its draws.
        ends: tokens that end a text or a turn.
    """

    tokens: int
    temperature: float
    nucleus: float
    seed: int
    ends: frozenset[int]


@dataclass
class Written:
    """One text.

    Attributes:
        number: its draws are those of this number, whatever is written beside it.
        parts: the tokens of the text, the word that it begins with among them; of a conversation the question's and
            the answer's.
        log_p: the sum of the log-likelihoods of those that the model wrote, whatever the temperature and the nucleus.
        given: how many the model did not write.
    """

    number: int
    parts: list[list[int]] = field(default_factory=lambda: [[]])
    log_p: float = 0.0
    given: int = 0

    @property
    def mean_log_p(self) -> float:
        """For each token that the model wrote."""
        return self.log_p / max(1, sum(map(len, self.parts)) - self.given)

    def record(self) -> dict[str, Any]:
        """As JSON values, from which `Written(**record)` makes the same again."""
        return asdict(self)


class _Row:
    """A text that is being written."""

    def __init__(self, number: int, opening: Opening, manner: Manner) -> None:
        word = opening.word(manner.seed, number)
        self.text = Written(number, [list(word)], given=len(word))
        self.uniform = np.random.default_rng([manner.seed, number]).random
        self._ends, self._turn, self._forced = manner.ends, opening.turn, deque(word)
        # A question may take half of what both have: without an answer it would be none.
        self._longest = (manner.tokens - len(opening.first) - len(opening.turn)) // 2

    def next(self, token: int, log_p: float) -> int | None:
        """The token that comes, where this one was drawn; None where the text has ended."""
        if self._forced:
            return self._forced.popleft()
        asks = bool(self._turn)
        if token in self._ends or (asks and len(self.text.parts[0]) == self._longest):
            if not asks or not self.text.parts[0]:
                return None
            self.text.parts.append([])
            self._forced, self._turn = deque(self._turn), ()
            return self._forced.popleft()
        self.text.parts[-1].append(token)
        self.text.log_p += log_p
        return token


@torch.no_grad()
def write(
    model: PreTrainedModel,
    opening: Opening,
    numbers: Sequence[int],
    manner: Manner,
    advanced: Callable[[float], None] = lambda done: None,
) -> list[Written]:
    """Write texts side by side, each until it ends or has its tokens.

    Args:
        model: a decoder.
        opening: what all of them begin with.
        numbers: of the texts.
        manner: how they are drawn.
        advanced: told the share of the tokens that is written.

    Raises:
        StageError: logits that are no distribution.
    """
    every = [_Row(number, opening, manner) for number in numbers]
    rows, cache = list(every), None
    ids_NT = torch.tensor([opening.first] * len(rows))
    read_NT = ids_NT
    while rows and ids_NT.shape[1] < manner.tokens:
        said = model(input_ids=read_NT, past_key_values=cache, use_cache=True)
        cache = getattr(said, "past_key_values", None)
        token_N, log_p_N = _drawn(said.logits[:, -1], rows, manner)
        came = [row.next(token, log_p) for row, token, log_p in zip(rows, token_N, log_p_N, strict=True)]
        left = [n for n, token in enumerate(came) if token is not None]
        if len(left) < len(rows):
            rows, ids_NT, cache = [rows[n] for n in left], ids_NT[left], _thinned(cache, left)
        ids_NT = torch.cat([ids_NT, torch.tensor([[came[n]] for n in left], dtype=torch.int64).view(-1, 1)], dim=1)
        # A model without a cache of keys and values reads all of it again.
        read_NT = ids_NT[:, -1:] if cache is not None else ids_NT
        advanced(ids_NT.shape[1] / manner.tokens)
    advanced(1)
    return [row.text for row in every]


def together(model: PreTrainedModel, opening: Opening, manner: Manner) -> int:
    """How many texts are written side by side: as many as `CACHE_BYTES` hold, and no more than are of use."""
    with torch.no_grad():
        said = model(input_ids=torch.tensor([opening.first]), use_cache=True)
    layers = getattr(getattr(said, "past_key_values", None), "layers", ())
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    bytes_a_token = sum(one.nbytes for one in held if isinstance(one, Tensor)) / len(opening.first)
    most = CACHE_BYTES / max(1.0, bytes_a_token * manner.tokens)
    return max(1, min(MOST_TOGETHER, int(most)))


def _drawn(logits_NV: Tensor, rows: Sequence[_Row], manner: Manner) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-likelihood under the model."""
    # float32, as running sums are of float64 inside: of 49,152 tokens float64 throughout took a third of all writing.
    less_NV = logits_NV.float()
    less_NV = less_NV - less_NV.amax(1, keepdim=True)
    p_NV = (less_NV if manner.temperature == 1 else less_NV / manner.temperature).exp()
    try:
        token_N = drawn_from_nucleus(p_NV, manner.nucleus, [row.uniform for row in rows])
    except ValueError as error:
        raise StageError(
            "the model gave logits that are no distribution while it wrote",
            measured="NaN, or nothing finite",
            remedy="Judge the checkpoint first: it is damaged, or too large for the numbers that it computes in.",
        ) from error
    whole_N = (p_NV if manner.temperature == 1 else less_NV.exp()).sum(1)
    return token_N.tolist(), (less_NV.gather(1, token_N[:, None])[:, 0] - whole_N.log()).tolist()


def _thinned(cache: Any, left: list[int]) -> Any:
    """The cache of these rows alone; None where it cannot be had, so that all is read again."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    cache.batch_select_indices(torch.tensor(left, dtype=torch.int64))
    return cache
