"""Measures of translations and summaries, from the documents of items; see `stages.measures.item_scores`.

What is counted of each item is what sacrebleu counts there, and ROUGE is a mean over items, so that a resample's value
comes from sums alone.

Shapes: R resamples, D items, N lengths of n-grams, X counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.measures.item_scores import Columns, Floats
from stages.measures.spans import segments

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

ROUGE = ("rouge1", "rouge2", "rougeL")
_LENGTHS = 4
_RECALL = 4.0
"""chrF's beta of 2, squared: recall counts so many times as much as precision."""


def translation(references: Sequence[str], language: str, said: str) -> dict[str, list[int]]:
    """What a translation adds to BLEU and chrF.

    Args:
        references: at least one.
        language: `zh` for sacrebleu's tokenizer of Chinese, anything else for its default.
        said: the translation.

    Returns:
        `bleu`: length, the nearest reference's, and for each length of n-grams those that match, then all; `chrf`: for
        each length of runs of characters those of the translation, of the reference and of both.
    """
    bleu, chrf = _counters("zh" if language == "zh" else "13a")
    streams = [[one] for one in references]
    found = bleu.corpus_score([said], streams)
    # Of chrF the library shows a corpus's score, but not its counts.
    (counts,) = chrf._extract_corpus_statistics([said], streams)
    return {"bleu": [found.sys_len, found.ref_len, *found.counts, *found.totals], "chrf": [int(one) for one in counts]}


def summary(references: Sequence[str], language: str, said: str) -> dict[str, float]:
    """ROUGE of a summary, the best over the references: F1 of words, of pairs of words, and of what follows in order.

    Words are rouge-score's own; of `zh` they are characters, of which its tokenizer leaves nothing.
    """
    found = _rouge(language == "zh").score_multi(list(references), said)
    return {name: float(found[name].fmeasure) for name in ROUGE}


@lru_cache(maxsize=2)
def _counters(tokenizer: str) -> tuple[BLEU, CHRF]:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(tokenize=tokenizer), CHRF()


@lru_cache(maxsize=2)
def _rouge(of_characters: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), tokenizer=_Characters() if of_characters else None)


class _Characters:
    """What rouge-score asks for words."""

    def tokenize(self, text: str) -> list[str]:
        return segments(text)


def bleu(ours: Columns, weights_RD: Floats) -> Floats:
    """BLEU over all items, from 0 to 100; n-grams without a match are smoothed as sacrebleu does.

    Source: Papineni et al., BLEU, 2002; Post, A Call for Clarity in Reporting BLEU Scores, 2018 (smoothing `exp`).
    """
    counts_RX = _sums(ours["bleu"], weights_RD)
    said_R, there_R = counts_RX[:, 0], counts_RX[:, 1]
    match_RN, all_RN = counts_RX[:, 2 : 2 + _LENGTHS], counts_RX[:, 2 + _LENGTHS :]
    with np.errstate(all="ignore"):
        brevity_R = np.where(said_R < there_R, np.exp(1 - there_R / said_R), 1.0)
        halved_RN = 0.5 ** np.cumsum(match_RN == 0, axis=-1)
        log_RN = np.log(np.where(match_RN == 0, halved_RN, match_RN) / all_RN)
        found_R = 100 * brevity_R * np.exp(log_RN.mean(-1))
    # Where nothing is as long as the longest n-grams, there is no precision of these.
    found: Floats = np.where((match_RN.sum(-1) > 0) & (all_RN > 0).all(-1), found_R, 0.0)
    return found


def chrf(ours: Columns, weights_RD: Floats) -> Floats:
    """Runs of one to six characters (chrF) over all items, from 0 to 100.

    Source: Popović, chrF: character n-gram F-score for automatic MT evaluation, 2015.
    """
    counts_RN3 = _sums(ours["chrf"], weights_RD).reshape(len(weights_RD), -1, 3)
    said_RN, there_RN, both_RN = (counts_RN3[..., at] for at in range(3))
    seen_RN = (said_RN > 0) & (there_RN > 0)
    precision_R, recall_R = (
        np.where(seen_RN, both_RN / np.where(seen_RN, of_RN, 1), 0).sum(-1) / np.maximum(seen_RN.sum(-1), 1)
        for of_RN in (said_RN, there_RN)
    )
    below_R = _RECALL * precision_R + recall_R
    found: Floats = 100 * (1 + _RECALL) * precision_R * recall_R / np.where(below_R > 0, below_R, 1)
    return found


def rouge1(ours: Columns, weights_RD: Floats) -> Floats:
    """The mean ROUGE-1 of the items."""
    return _mean(ours["rouge1"], weights_RD)


def rouge2(ours: Columns, weights_RD: Floats) -> Floats:
    """The mean ROUGE-2 of the items."""
    return _mean(ours["rouge2"], weights_RD)


def rougel(ours: Columns, weights_RD: Floats) -> Floats:
    """The mean ROUGE-L of the items, each taken as one sentence."""
    return _mean(ours["rougeL"], weights_RD)


def _sums(counts_DX: Any, weights_RD: Floats) -> Floats:
    found_RX: Floats = weights_RD @ counts_DX.astype(np.float64)
    return found_RX


def _mean(values_D: Any, weights_RD: Floats) -> Floats:
    found: Floats = _sums(values_D, weights_RD) / weights_RD.sum(-1)
    return found
