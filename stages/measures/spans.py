"""Short answers to questions about a text, by SQuAD's rules; of Chinese by those of CMRC 2018.

Sources: Rajpurkar et al., Know What You Don't Know: Unanswerable Questions for SQuAD, 2018; Cui et al., A
Span-Extraction Dataset for Chinese Machine Reading Comprehension, 2019.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from stages.measures.item_scores import Columns, Floats

HAN = "\u3400-\u9fff"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Those that CMRC 2018 takes out: a point or a per cent sign may be what makes an answer.
_NO_MARKS = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_SEGMENT = re.compile(rf"[{HAN}]|…+|\d+(?:[.,]\d+)*|[^\W{HAN}]+|[^\w\s]")


def scored(accepted: Sequence[str], language: str, said: str) -> dict[str, float]:
    """How well an answer matches the best of those that are accepted.

    Args:
        accepted: empty for a question that the text does not answer: nothing must be said.
        language: `zh` for CMRC's rules.
        said: the answer.

    Returns:
        `exact`, 0 or 1, and `overlap`, the F1 of their words, or characters.
    """
    words, overlap = (_segments, _run) if language == "zh" else (_words, _common)
    exactly = _plain if language == "zh" else _normal
    right = [one for one in accepted if words(one)] or [""]
    exact = max(float(exactly(one) == exactly(said)) for one in right)
    return {
        "exact": exact,
        "overlap": max(_f1(words(one), words(said), overlap(words(one), words(said))) for one in right),
    }


def segments(text: str) -> list[str]:
    """Characters of Chinese, and words and numbers of what stands between; no punctuation."""
    return [one for one in _segments(text) if one[0].isalnum()]


def exact_match(ours: Columns, weights_RD: Floats) -> Floats:
    """The share of questions that are answered exactly."""
    return _mean(ours["exact"], weights_RD)


def answer_f1(ours: Columns, weights_RD: Floats) -> Floats:
    """The mean over questions of the F1 between an answer's words and those of the best accepted one."""
    return _mean(ours["overlap"], weights_RD)


def _normal(text: str) -> str:
    """Lower case, without punctuation and articles, in single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _words(text: str) -> list[str]:
    return _normal(text).split()


def _plain(text: str) -> str:
    return text.lower().strip().translate(_NO_MARKS)


def _segments(text: str) -> list[str]:
    return _SEGMENT.findall(_plain(text))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Words that both have, in whatever order."""
    return (Counter(a) & Counter(b)).total()


def _run(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest run that stands in both."""
    longest, before = 0, [0] * (len(b) + 1)
    for one in a:
        here = [0] * (len(b) + 1)
        for at, other in enumerate(b):
            if one == other:
                here[at + 1] = before[at] + 1
        longest, before = max(longest, *here), here
    return longest


def _f1(expected: Sequence[str], said: Sequence[str], shared: int) -> float:
    if not expected or not said:
        return float(list(expected) == list(said))
    return 2 * shared / (len(expected) + len(said))


def _mean(values_D: Floats, weights_RD: Floats) -> Floats:
    found: Floats = weights_RD @ values_D.astype(np.float64) / weights_RD.sum(-1)
    return found
