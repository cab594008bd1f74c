"""The table of measures: one line a measure, imported when it is asked for, so that the table is read without torch.

A measure is a function of logits that gives one value for each predicted token: `(logits_TV, next_T)`, or with a
baseline `(baseline_TV, logits_TV)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What `validate` measures on text.

    Attributes:
        function: module and name of the function of logits.
        score: the key of its sum over a document in report.json; the measure is the mean over all tokens.
        title: its heading in a report, where that is not its name.
        paired: it compares with a baseline.
        count: its sum counts tokens.
        exponential: the measure is the mean's exponential.
    """

    function: str
    score: str
    title: str = ""
    paired: bool = False
    count: bool = False
    exponential: bool = False


MEASURES: Mapping[str, Measure] = {
    "perplexity": Measure("stages.measures.perplexity:negative_log_likelihood", "nll", exponential=True),
    "kl_divergence": Measure("stages.measures.divergence:kl_divergence", "kl", "KL divergence", paired=True),
    "top1_agreement": Measure(
        "stages.measures.divergence:top1_agreement", "agree", "top-1 agreement", paired=True, count=True
    ),
}
