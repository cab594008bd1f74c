"""The next token, drawn from what a model says comes next.

Shapes: N sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stages.runtime.contract import StageError
from stages.serving.generate import Weigh
from stages.serving.generation import Generation
from stages.serving.rules import FREE, Rules


class Drawing:
    """Chooses each next token of several prompts; see `stages.serving.generate.Choose`.

    Each prompt has a generator of its own from the same seed: what is drawn does not depend on what is asked beside.
    """

    def __init__(self, how: Generation, prompts: int, rules: Rules = FREE) -> None:
        self.how, self.rules = asked_by(how, rules), rules
        self.draws = [np.random.default_rng(how.seed) for _ in range(prompts)]

    def __call__(self, number: int, row: Sequence[int], logits_V: NDArray[np.float32], said: int = 0) -> int:
        """The token that follows a row, of which so many tokens are of the answer."""
        logits_V = self.rules.allowed(logits_V, row, said)
        if self.how.temperature == 0:
            return int(penalized(logits_V, row, self.how.repetition_penalty).argmax())
        reached_V = probabilities(logits_V, row, self.how).cumsum()
        if not np.isfinite(reached_V[-1]):
            raise StageError(
                "the model says no number for a token",
                measured=f"{np.count_nonzero(~np.isfinite(logits_V))} of {len(logits_V)} logits are not finite",
                remedy="Make it again from a checkpoint whose weights are numbers.",
            )
        # The last sum, not 1: the token is then one that has a probability, whatever was rounded.
        return int(np.searchsorted(reached_V, self.draws[number].random() * reached_V[-1], side="right"))


def asked_by(how: Generation, rules: Rules) -> Generation:
    """What is asked, with the settings' own penalty where nobody says one."""
    return how if how.repetition_penalty is not None else replace(how, repetition_penalty=rules.repetition_penalty)


def weighing(how: Generation, rules: Rules, seen: Callable[[int, Sequence[int]], Sequence[int]]) -> Weigh:
    """What settings allow, and what it costs to say a token again.

    Args:
        how: what is asked.
        rules: of the settings.
        seen: (number of the prompt, its new tokens) -> what a decoder has read then.
    """
    penalty = asked_by(how, rules).repetition_penalty

    def weigh(number: int, new: Sequence[int], score_V: NDArray[np.float32]) -> NDArray[np.float32]:
        row = seen(number, new)
        return penalized(rules.allowed(score_V, row, len(new)), row, penalty)

    return weigh


def penalized(logits_V: NDArray[np.float32], seen: Sequence[int], penalty: float | None) -> NDArray[np.float32]:
    """Logits in which tokens that were seen are less likely, each once however often it was.

    Source: Keskar et al., CTRL, 2019, section 4.1, with the product for negative logits that transformers has.
    """
    if penalty in (None, 1):
        return logits_V
    found_V = logits_V.copy()
    tokens = np.unique(np.asarray(seen, dtype=np.int64))
    tokens = tokens[tokens < len(found_V)]
    said = found_V[tokens]
    found_V[tokens] = np.where(said < 0, said * penalty, said / penalty)
    return found_V


def log_probabilities(logits_NV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row; summed in float64, as a vocabulary has many."""
    less_NV = logits_NV - logits_NV.max(-1, keepdims=True)
    found: NDArray[np.float32] = less_NV - np.log(np.exp(less_NV).sum(-1, keepdims=True, dtype=np.float64)).astype(
        np.float32
    )
    return found


def probabilities(logits_V: NDArray[np.float32], seen: Sequence[int], how: Generation) -> NDArray[np.float64]:
    """The distribution that the next token is drawn from: penalty, temperature, top k, top p, in this order.

    Args:
        logits_V: what the model says.
        seen: tokens of the prompt and of the answer so far.
        how: what is asked; its temperature is above 0.

    Source: Fan et al., Hierarchical Neural Story Generation, 2018 (top k); Holtzman et al., The Curious Case of Neural
    Text Degeneration, 2020 (top p).
    """
    scores_V = penalized(logits_V, seen, how.repetition_penalty).astype(np.float64)
    # From the largest on, so that no temperature is too low for it.
    scores_V = (scores_V - scores_V.max()) / how.temperature
    if 0 < how.top_k < len(scores_V):
        scores_V[scores_V < np.partition(scores_V, -how.top_k)[-how.top_k]] = -np.inf
    found_V = np.exp(scores_V)
    found_V /= found_V.sum()
    if how.top_p < 1:
        over = 1 - how.top_p
        # All tokens that small together are not more than goes: only the others need an order (6 ms of 49,152 tokens).
        small_V = found_V <= over / len(found_V)
        small_V[scores_V.argmax()] = False
        rising = np.flatnonzero(~small_V)
        # By their scores: those that differ by less than a probability can say stay in order.
        rising = rising[scores_V[rising].argsort(kind="stable")]
        out = found_V[small_V].sum() + found_V[rising].cumsum() <= over
        out[-1] = False
        found_V[small_V] = found_V[rising[out]] = 0
        found_V /= found_V.sum()
    return found_V
