"""Rows of tokens put to a model such that only those of one length stand side by side, without padding.

Some classifiers look for the last token, and the mean over a text's tokens is over no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from stages.runtime.contract import StageError
from stages.serving.engine import Answerer
from stages.serving.generate import ROWS


def by_length(
    rows: Sequence[Sequence[int]], model: Answerer, segments: Sequence[Sequence[int]] = ()
) -> list[torch.Tensor]:
    """What a model answers to each row, whose tokens are of these segments, or else all of the first.

    Raises:
        StageError: an answer that is not finite.
    """
    found: dict[int, torch.Tensor] = {}
    places = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for _, alike in groupby(places, key=lambda place: len(rows[place])):
        same = list(alike)
        for some in (same[start : start + ROWS] for start in range(0, len(same), ROWS)):
            given = [np.array([of[place] for place in some], dtype=np.int64) for of in (rows, segments) if of]
            answers = model.logits(*given)
            if not np.isfinite(answers).all():
                raise no_distribution("NaN or infinity")
            found |= dict(zip(some, torch.from_numpy(answers), strict=True))
    return [found[place] for place in range(len(rows))]


def no_distribution(measured: str) -> StageError:
    """The refusal of answers to items that nothing can be made of."""
    return StageError(
        "the model or its baseline gave logits that are no distribution",
        measured=measured,
        limit="finite",
        remedy="Look for NaN or overflow in the step that made the model: judge its input checkpoint the same way.",
    )
