"""What a model of any task predicts of one window, as rows that can be scored.

Shapes: T tokens of the window, R rows, V what a row is over: the vocabulary, classes, or a vector's dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Answer = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [N, T] -> what the model answers: [N, T, V] for each token, or [N, V] for the whole."""

TOGETHER = 16
"""Copies of a window that a masked model reads side by side."""


@dataclass(frozen=True)
class Asking:
    """How a window is put to a model.

    Attributes:
        task: what the model is for: a key of `stages.models.anatomy.tasks.TASKS`, or `score`.
        before: tokens that the tokenizer puts before every text; nobody predicts them.
        after: tokens that it puts behind; only an answer that is translated ends with them.
        mask: the token that hides another one, for `fill`.
        pooled: `embed` answers with one vector of a text: of the window, and of its first half, from which it differs.
        several: of `classify`, any number of classes may hold at once.
    """

    task: str = "generate"
    before: int = 0
    after: int = 0
    mask: int | None = None
    pooled: bool = False
    several: bool = False

    def rows(self, tokens: int) -> int:
        """R of a window of so many tokens."""
        if self.pooled:
            return 2
        return {
            "classify": 1,
            "score": 1,
            "choose": 1,
            "answer": 2,
            "tag": tokens,
            "embed": tokens,
            "translate": tokens,
        }.get(self.task, len(self._asked(tokens)))

    def predicted(self, answer: Answer, ids_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows_RV, and what came where the model predicts tokens: target_R.

        `generate` predicts each token from those before it. `fill` predicts each from all others, hidden one at a time
        (Salazar et al. 2020, Masked Language Model Scoring). `translate` reads the window and is asked for the same
        window, each token from those before it (teacher forcing). The others answer without a target.
        """
        window = ids_T[None].numpy()
        asked = self._asked(len(ids_T))
        if self.task == "fill":
            return self._filled(answer, ids_T, asked), ids_T[asked]
        found_TV = torch.from_numpy(answer(window)[0])
        if self.pooled:
            return torch.stack([found_TV, torch.from_numpy(answer(self._half(ids_T)[None].numpy())[0])]), None
        if self.task == "generate":
            return found_TV[asked.start - 1 : asked.stop - 1], ids_T[asked.start : asked.stop]
        if self.task == "translate":
            return found_TV, ids_T
        return found_TV.view(-1, found_TV.shape[-1]), None

    def _half(self, ids_T: Tensor) -> Tensor:
        """The first half of a window, between what the tokenizer puts around every text."""
        own_T = ids_T[self.before : len(ids_T) - self.after]
        half_T = own_T[: max(1, len(own_T) // 2)]
        return torch.cat([ids_T[: self.before], half_T, ids_T[len(ids_T) - self.after :]])

    def _asked(self, tokens: int) -> range:
        first = self.before if self.task == "fill" else max(1, self.before)
        return range(first, tokens - self.after)

    def _filled(self, answer: Answer, ids_T: Tensor, asked: range) -> Tensor:
        assert self.mask is not None
        parts = []
        for start in range(asked.start, asked.stop, TOGETHER):
            hidden = torch.arange(start, min(start + TOGETHER, asked.stop))
            copies_NT = ids_T.repeat(len(hidden), 1)
            copies_NT[torch.arange(len(hidden)), hidden] = self.mask
            found_NTV = torch.from_numpy(answer(copies_NT.numpy()))
            parts.append(found_NTV[torch.arange(len(hidden)), hidden])
        return torch.cat(parts)
